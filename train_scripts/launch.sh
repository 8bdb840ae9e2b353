#!/usr/bin/env bash
# bash launch.sh CONFIG [OPTION ...]
# Run train.py with one process per GPU of this machine, or one on the CPU; NPROC=4 starts four processes.
# CONFIG is relative to configs/; paths in the options are relative to the current directory.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
nproc="${NPROC:-$(python3 -c 'import torch; print(torch.cuda.device_count() or 1)')}"
for option in "$@"; do [[ $option == --dry-run ]] && nproc=1; done
program=("$root/train.py" --config "$root/configs/$1" "${@:2}")
[[ $nproc == 1 ]] && exec python3 "${program[@]}"
exec python3 "$root/sample/scripts/torchrun.py" --standalone --nproc_per_node="$nproc" "${program[@]}"
