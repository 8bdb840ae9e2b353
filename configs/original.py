"""What YAML files written for the original Latte and Skip-DiT code need in order to load unchanged."""

import warnings
from collections.abc import Collection
from typing import Any

ALIASES = {  # the original's keys -> ours
    "save_img_path": "save_video_path",
    "accumulation_steps": "gradient_accumulation_steps",
}
INERT = {  # the original's keys that do nothing here, and why
    "attention_bias": "the attention always has its bias, as in every checkpoint",
    "save_ceph": "files are written to save_video_path or results_dir",
    "load_from_ceph": "files are read from data_path",
    "enable_xformers_memory_efficient_attention": "attention_mode: auto picks the fastest",
    "run_time": "videos are counted by num_fvd_samples",
    "num_sample": "videos are counted by num_fvd_samples, or samples_per_class",
    "negative_name": "the null label comes from num_classes",
    "frame_interval": "clips are sampled at the interval of their training",
}
BARE_WORDS = {  # YAML reads a bare `no` as False; the original had False for mixed_precision
    "mixed_precision": {False: "no", True: "bf16", None: "no"},
    "resume_from_checkpoint": {False: "no", True: "auto", None: "auto"},
}


def translate(values: dict[str, Any], known: Collection[str], source: str) -> dict[str, Any]:
    """Keys and values of a YAML file in our terms. A key that does nothing here is named in a warning and left out.

    Args:
        known: the keys of the options that the values are for.
        source: the file's name, for the warning.
    """
    ours: dict[str, Any] = {}
    for key, value in values.items():
        key = ALIASES.get(key, key)
        if key == "fixed_spatial":  # also in the original's sampling files, where it is always False
            if value and "train_only" in known:
                ours["train_only"] = "temporal"
        elif key in INERT and key not in known:
            warnings.warn(f"{source}: {key} does nothing here ({INERT[key]})", stacklevel=4)
        elif key in BARE_WORDS:
            ours[key] = BARE_WORDS[key].get(value, value)
        else:
            ours[key] = value
    return ours
