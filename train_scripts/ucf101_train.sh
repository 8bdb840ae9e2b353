#!/usr/bin/env bash
# Train Skip-DiT on clips and stills of UCF101. Set data_path in configs/ucf101/ucf101_img_train.yaml, or pass it:
#   bash train_scripts/ucf101_train.sh data_path=/data/ucf101 local_batch_size=2
# Without stills: CONFIG=ucf101/ucf101_train.yaml bash train_scripts/ucf101_train.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "${CONFIG:-ucf101/ucf101_img_train.yaml}" "$@"
