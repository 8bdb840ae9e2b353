"""The exception for mistakes that the user can fix, and the hints in its message."""

import difflib
from collections.abc import Collection, Iterable

MOST_LISTED = 15  # valid words in a message
BATCH, PIXELS = "batch batchsize bs batch_size train_batch_size", "height width resolution img_size size"
FILES, STEPS = "data dataset_path data_dir data_root videos input", "epochs num_epochs max_steps total_steps iterations"
HINTS = {  # an option with an example, or what to do -> the words that people type for it
    "cfg_scale=7": "cfg guidance guidance_scale cfg_weight scale w",
    "num_sampling_steps=50": "steps num_steps num_inference_steps sampling_steps ddim_steps timesteps nfe",
    "max_train_steps=20000": f"steps num_steps max_train_step num_train_steps train_steps {STEPS}",
    "sample_method=ddim": "sampler scheduler solver method",
    "per_proc_batch_size=4": BATCH,
    "local_batch_size=4": BATCH,
    "num_clips=16": "n num_samples n_samples num_videos samples clips num_sample nsamples",
    "samples_per_class=2": "n_per_class per_class",
    "sample_names=[0,3]": "class classes class_label label y",
    "image_size=64": PIXELS,
    "num_frames=16": "frames n_frames length video_length num_frame",
    "frame_interval=3": "fps stride frame_stride sample_rate",
    "ckpt=weights.pt": "checkpoint ckpt_path weights model_path model_ckpt load",
    "pretrained=weights.pt": "checkpoint ckpt ckpt_path weights model_path load init finetune pretrained_path",
    "pretrained_model_path=pretrained/Latte": "vae_path vae_dir vae_ckpt",
    "data_path=videos": FILES,
    "real_path=videos": f"real real_dir {FILES}",
    "fake_path=sample_videos/mine": "fake fake_dir samples samples_path generated",
    "output=results/mine": "out outdir output_dir output_path save_dir save_path results name run_name exp_name logdir",
    "learning_rate=1e-4": "lr learning rate learnrate",
    "lr_warmup_steps=1000": "warmup warmup_steps num_warmup_steps",
    "lr_schedule=cosine": "scheduler lr_scheduler schedule",
    "weight_decay=0.01": "wd decay",
    "ema_decay=0.999": "ema ema_rate",
    "clip_max_norm=0.1": "clip grad_clip max_grad_norm gradient_clip_val",
    "gradient_accumulation_steps=4": "accumulation accum grad_accum accumulate_grad_batches accum_steps",
    "ckpt_every=1000": "save_every save_interval save_steps checkpointing_steps checkpoint_every",
    "log_every=10": "log_interval logging_steps print_every",
    "resume_from_checkpoint=auto": "resume resume_from continue resume_ckpt restart",
    "num_workers=4": "workers num_worker n_workers",
    "mixed_precision=bf16": "precision dtype fp16 bf16 half amp use_fp16",
    "precision=bf16": "dtype fp16 bf16 half fp32 mixed_precision",
    "use_compile=True": "compile torch_compile",
    "cache.interval=2": "interval skip_interval cache_interval n_cache skip_cache deepcache_interval",
    "classes come from --classes Cup 3; the model reads no text": "prompt prompts text caption negative_prompt",
    "torchrun --standalone --nproc_per_node=2 PROGRAM starts a process on each GPU": (
        "gpus gpu num_gpus n_gpus ngpu devices nproc nproc_per_node num_processes"
    ),
    "a GPU is used where there is one; CUDA_VISIBLE_DEVICES chooses it": "device cuda cpu gpu_id use_cuda",
    "clip i has the seed seed + i, so seed=1 is enough for several clips": "seeds",
}


class UserError(ValueError):
    """A mistake of the user. The message is one line that names the mistake and the fix."""


def choice(key: str, value: str, valid: Iterable[str]) -> str:
    """Returns `value` if it is valid; otherwise raises UserError, which lists the valid values."""
    if value not in valid:
        raise UserError(f"{key}: {value!r} is unknown; valid: {', '.join(map(str, valid))}")
    return value


def suggest(word: str, valid: Iterable[str]) -> str:
    """Returns the end of an error about an unknown word: the nearest valid word, or all of them."""
    near = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; valid: {', '.join(sorted(valid))}"


def suggest_option(word: str, options: Collection[str]) -> str:
    """Returns the end of an error about an unknown option: what it is called here, with an example, or the nearest."""
    plain = word.lstrip("-").lower().replace("-", "_")
    for example, words in HINTS.items():
        key = example.partition("=")[0]
        if plain in words.split() and (" " in key or key.partition(".")[0] in options):
            return f"; {example}" if " " in key else f"; did you mean {key}, as in {example}?"
    if len(options) > MOST_LISTED and not difflib.get_close_matches(word, options, n=1, cutoff=0.5):
        return "; --help lists the options"
    return suggest(word, options)
