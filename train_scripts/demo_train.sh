#!/usr/bin/env bash
# Train the demo's model on a CPU: encode the clips in datasets/demo with the VAE in pretrained/demo, then train the
# transformer on the latents. It took 2.6 hours on two cores that did other work too. The same command resumes the run.
# Options can follow.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python3 "$root/tools/encode_latents.py" --config "$root/configs/demo/demo_train.yaml" "$@"
exec python3 "$root/train.py" --config "$root/configs/demo/demo_train.yaml" "$@"
