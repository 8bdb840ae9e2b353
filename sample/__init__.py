"""Sampling: from a checkpoint, seeds and labels to folders of clips."""

SAMPLE_RECORD = "sample.json"  # of sample.py: a folder for each plan lies beside it
DDP_RECORD = "sample_ddp.json"  # of sample_ddp.py: its clips lie beside it
