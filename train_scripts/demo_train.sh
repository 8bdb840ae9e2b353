#!/usr/bin/env bash
# Train the demo's model on a CPU, from the clips in datasets/demo and the VAE in pretrained/demo: first the clips are
# encoded to latents, then the transformer is trained on those: 2.6 hours on two cores that were also used for other
# work. The same command continues. Any option can follow.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python3 "$root/tools/encode_latents.py" --config "$root/configs/demo/demo_train.yaml" "$@"
exec python3 "$root/train.py" --config "$root/configs/demo/demo_train.yaml" "$@"
