#!/usr/bin/env bash
# Train Skip-DiT on FaceForensics: put your path into configs/ffs/ffs_img_train.yaml first. Any option can follow:
#   bash train_scripts/ffs_train.sh data_path=/data/ffs local_batch_size=2
# Clips without stills: CONFIG=ffs/ffs_train.yaml bash train_scripts/ffs_train.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "${CONFIG:-ffs/ffs_img_train.yaml}" "$@"
