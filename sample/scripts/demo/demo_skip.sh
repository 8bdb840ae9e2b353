#!/usr/bin/env bash
# Sample 70 clips of the demo's model, all steps in full. Options can follow: --dry-run, num_fvd_samples=14, ...
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "$here/../launch.sh" demo/demo_sample.yaml save_video_path="$here/../../../sample_videos/demo_skip" "$@"
