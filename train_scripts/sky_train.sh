#!/usr/bin/env bash
# Train Skip-DiT on SkyTimelapse: put your path into configs/sky/sky_img_train.yaml first. Any option can follow:
#   bash train_scripts/sky_train.sh data_path=/data/sky local_batch_size=2
# Clips without stills: CONFIG=sky/sky_train.yaml bash train_scripts/sky_train.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "${CONFIG:-sky/sky_img_train.yaml}" "$@"
