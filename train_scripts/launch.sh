#!/usr/bin/env bash
# bash launch.sh CONFIG [OPTION ...]: train.py through torchrun, one process on each GPU of this machine, or one on the
# CPU. NPROC=4 starts four. CONFIG is relative to configs/, paths among the options to the current directory.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
nproc="${NPROC:-$(python3 -c 'import torch; print(torch.cuda.device_count() or 1)')}"
exec torchrun --standalone --nproc_per_node="$nproc" "$root/train.py" --config "$root/configs/$1" "${@:2}"
