"""Sampling: clips from a checkpoint, seeds and labels, and the folders that hold them."""

SAMPLE_RECORD = "sample.json"  # written by sample.py, beside a folder of clips for each plan
DDP_RECORD = "sample_ddp.json"  # written by sample_ddp.py, beside the clips
