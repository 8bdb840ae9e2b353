#!/usr/bin/env bash
# One clip of every class, uncached and with three Skip-Cache plans: speed, fidelity, videos (`make demo`), and a page.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
report() { # passes on what sample.py says, and makes a page of the folder it names at the end
    while IFS= read -r line; do
        echo "$line"
        if [[ $line == "videos: "* ]]; then python3 "$root/tools/report.py" "${line#videos: }"; fi
    done
}
python3 "$root/sample/sample.py" --config "$root/configs/demo/demo_sample.yaml" --compare --cache N2 N4 N4-o2 "$@" | report
