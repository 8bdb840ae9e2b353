#!/usr/bin/env bash
# Train Skip-DiT on clips and stills of Taichi-HD. Set data_path in configs/taichi/taichi_img_train.yaml, or pass it:
#   bash train_scripts/taichi_train.sh data_path=/data/taichi local_batch_size=2
# Without stills: CONFIG=taichi/taichi_train.yaml bash train_scripts/taichi_train.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "${CONFIG:-taichi/taichi_img_train.yaml}" "$@"
