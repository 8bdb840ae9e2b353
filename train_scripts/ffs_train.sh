#!/usr/bin/env bash
# Train Skip-DiT on clips and stills of FaceForensics. Set data_path in configs/ffs/ffs_img_train.yaml, or pass it:
#   bash train_scripts/ffs_train.sh data_path=/data/ffs local_batch_size=2
# Without stills: CONFIG=ffs/ffs_train.yaml bash train_scripts/ffs_train.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "${CONFIG:-ffs/ffs_img_train.yaml}" "$@"
