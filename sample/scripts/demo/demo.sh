#!/usr/bin/env bash
# `make demo`: sample one clip of every class, uncached, with three Skip-Cache plans and by a recipe; compare them on a page.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
report() { # prints the output of sample.py, and makes a page of the folder that its last line names
    while IFS= read -r line; do
        echo "$line"
        if [[ $line == "videos: "* ]]; then python3 "$root/tools/report.py" "${line#videos: }"; fi
    done
}
python3 "$root/sample/sample.py" --config "$root/configs/demo/demo_sample.yaml" --compare --cache N2 N4 N4-o2 \
    --recipe "$root/pretrained/demo/recipe-43.json" "$@" | report
