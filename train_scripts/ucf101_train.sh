#!/usr/bin/env bash
# Train Skip-DiT on UCF101: put your path into configs/ucf101/ucf101_img_train.yaml first. Any option can follow:
#   bash train_scripts/ucf101_train.sh data_path=/data/ucf101 local_batch_size=2
# Clips without stills: CONFIG=ucf101/ucf101_train.yaml bash train_scripts/ucf101_train.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "${CONFIG:-ucf101/ucf101_img_train.yaml}" "$@"
