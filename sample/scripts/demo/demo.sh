#!/usr/bin/env bash
# One clip of every class, uncached and with two Skip-Cache plans: speed, fidelity, videos (`make demo`).
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
exec python3 "$root/sample/sample.py" --config "$root/configs/demo/demo_sample.yaml" --compare --cache N2 N4 "$@"
