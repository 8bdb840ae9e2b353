"""Translation of YAML files that were written for the original Latte and Skip-DiT code."""

import warnings
from collections.abc import Collection
from typing import Any

ALIASES = {  # the original's keys -> ours
    "save_img_path": "save_video_path",
    "accumulation_steps": "gradient_accumulation_steps",
}
INERT = {  # the original's keys that have no effect here -> the reason
    "attention_bias": "attention always has a bias, as in every checkpoint",
    "save_ceph": "files are written to save_video_path or results_dir",
    "load_from_ceph": "files are read from data_path",
    "enable_xformers_memory_efficient_attention": "attention_mode: auto picks the fastest",
    "run_time": "videos are counted by num_fvd_samples",
    "num_sample": "videos are counted by num_fvd_samples, or samples_per_class",
    "negative_name": "the null label comes from num_classes",
    "frame_interval": "clips are sampled at the interval of their training",
}
BARE_WORDS = {  # YAML reads a bare `no` as False; the original's mixed_precision was False or True
    "mixed_precision": {False: "no", True: "bf16", None: "no"},
    "resume_from_checkpoint": {False: "no", True: "auto", None: "auto"},
}


def translate(values: dict[str, Any], known: Collection[str], source: str) -> dict[str, Any]:
    """Returns the values under our keys, without those that have no effect here; a warning names each of those.

    Args:
        known: the keys that the program has options for.
        source: the file's name, for the warning.
    """
    ours: dict[str, Any] = {}
    for key, value in values.items():
        key = ALIASES.get(key, key)
        if key == "fixed_spatial":  # the original's sampling files have it too, always False
            if value and "train_only" in known:
                ours["train_only"] = "temporal"
        elif key in INERT and key not in known:
            warnings.warn(f"{source}: {key} does nothing here ({INERT[key]})", stacklevel=4)
        elif key in BARE_WORDS:
            ours[key] = BARE_WORDS[key].get(value, value)
        else:
            ours[key] = value
    return ours
