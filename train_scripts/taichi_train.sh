#!/usr/bin/env bash
# Train Skip-DiT on Taichi-HD: put your path into configs/taichi/taichi_img_train.yaml first. Any option can follow:
#   bash train_scripts/taichi_train.sh data_path=/data/taichi local_batch_size=2
# Clips without stills: CONFIG=taichi/taichi_train.yaml bash train_scripts/taichi_train.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "${CONFIG:-taichi/taichi_img_train.yaml}" "$@"
