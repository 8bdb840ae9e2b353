#!/usr/bin/env bash
# Train Skip-DiT on clips and stills of SkyTimelapse. Set data_path in configs/sky/sky_img_train.yaml, or pass it:
#   bash train_scripts/sky_train.sh data_path=/data/sky local_batch_size=2
# Without stills: CONFIG=sky/sky_train.yaml bash train_scripts/sky_train.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "${CONFIG:-sky/sky_img_train.yaml}" "$@"
