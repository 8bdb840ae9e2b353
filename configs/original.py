"""Translation of YAML files that were written for the original Latte and Skip-DiT code."""

import warnings
from collections.abc import Collection
from typing import Any

ALIASES = {  # other names of options, of the original or the same in all programs -> ours, the first that there is
    "save_img_path": ("save_video_path",),
    "accumulation_steps": ("gradient_accumulation_steps",),
    "output": ("save_video_path", "results_dir"),
    "output_dir": ("output",),
    "num_clips": ("num_fvd_samples",),
    "seed": ("global_seed",),
    "deepcache": ("cache.interval",),
    "budget": ("budgets",),
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
BARE_WORDS = {  # for those who know YAML's truth values; the original's mixed_precision was False or True
    "mixed_precision": {"false": "no", "true": "bf16", "": "no"},
    "resume_from_checkpoint": {"false": "no", "true": "auto", "": "auto"},
}


def other_names(key: str, known: Collection[str]) -> list[str]:
    """Returns the words that a program with the options `known` takes for the option `key`, too."""
    return [word for word in ALIASES if word not in known and our_name(word, known) == key]


def our_name(word: str, known: Collection[str]) -> str:
    """Returns the option that a word stands for in a program with the options `known`."""
    ours = (each for each in ALIASES.get(word, ()) if each.partition(".")[0] in known)
    return word if word in known else next(ours, word)


def translate(values: dict[str, Any], known: Collection[str], source: str) -> dict[str, Any]:
    """Returns values, as text, under our keys, without those that have no effect here; a warning names each of those.

    Args:
        known: the keys that the program has options for.
        source: the file's name, for the warning.
    """
    ours: dict[str, Any] = {}
    for key, value in values.items():
        key = our_name(key, known)
        if key == "fixed_spatial":  # the original's sampling files have it too, always False
            if str(value).lower() == "true" and "train_only" in known:
                ours["train_only"] = "temporal"
        elif key in INERT and key not in known:
            warnings.warn(f"{source}: {key} does nothing here ({INERT[key]})", stacklevel=4)
        elif key in BARE_WORDS:
            ours[key] = BARE_WORDS[key].get(str(value or "").lower(), value)
        else:
            ours[key] = value
    return ours
