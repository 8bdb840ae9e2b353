"""Training: resumed, distributed, accumulating and checkpointing runs equal the plain one; bad runs end in one line."""

import copy
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch._subclasses import FakeTensorMode

import train as program
from configs import ROOT, TrainConfig, UserError, load_config, to_yaml
from datasets import get_dataset
from datasets.latents import RECORD
from diffusion import Flow, make_diffusion
from models import get_models
from models.autoencoder import LatentCodec
from models.latte import init_skips_as_identity
from models.skip_cache import StaleFeatures
from sample.distributed import Environment
from tools.common.runs import RunLog
from tools.common.training import (
    EmaUpdate,
    StepGuard,
    check_same_clips,
    check_training_options,
    create_model,
    create_optimizer,
    learning_rate,
    set_learning_rate,
)
from train import clip_seed, train

pytestmark = pytest.mark.usefixtures("fresh_process_state")

TINY = dict(
    dataset="video_folder",
    model="Latte-skip",
    image_size=32,
    num_frames=4,
    num_classes=2,
    hidden_size=16,
    depth=8,
    num_heads=2,
    frame_interval=1,
    learning_rate=1e-2,
    start_clip_iter=0,
    clip_max_norm=1.0,
    local_batch_size=4,
    num_workers=0,
    max_train_steps=6,
    log_every=1,
    ckpt_every=2,
    ema_decay=0.5,
)

SHARED = dict(  # on two ranks: with data workers, stills, accumulation and a schedule
    num_workers=1,
    use_image_num=2,
    gradient_accumulation_steps=2,
    local_batch_size=2,
    learning_rate=1e-3,
    lr_schedule="cosine",
    lr_warmup_steps=3,
    max_train_steps=36,
    ckpt_every=12,
)


@pytest.fixture(scope="module")
def latents(tiny, tmp_path_factory) -> Path:
    """Six clips of two classes: the mean tells the class."""
    folder = tmp_path_factory.mktemp("latents")
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        mean = torch.randn(8, 1, 4, 4, 4, generator=generator) + (i % 2)
        path = folder / "ab"[i % 2] / f"{i}.mp4.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({"moments": torch.cat([mean, 0.1 * torch.ones_like(mean)], dim=2).half()}, path)
    record = {"dataset": "video_folder", "image_size": 32, "horizontal_flip": None}
    record |= {"vae": "tiny", "encoder": LatentCodec.from_pretrained(tiny.parent / "vae").fingerprint()}
    (folder / RECORD).write_text(json.dumps(record))
    return folder


def config(latents: Path, results: Path, **options) -> TrainConfig:
    options = {**TINY, "latents_path": latents, "results_dir": results, **options}
    return load_config(TrainConfig, None, [f"{key}={value}" for key, value in options.items()])


def run(latents: Path, results: Path, **options) -> dict[str, torch.Tensor]:
    """Train, and return the newest weights of the run."""
    train(config(latents, results, **options))
    AcceleratorState._reset_state(reset_partial_state=True)
    return newest(results)


def newest(results: Path) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(sorted(results.glob("*/checkpoints/*.pt"))[-1], weights_only=True)


def weights(results: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(next(results.glob(f"*/checkpoints/{step:07d}.pt")), weights_only=True)


def log_lines(results: Path) -> list[dict]:
    """What a run logged, without what the clock says."""
    lines = [json.loads(line) for line in next(results.glob("*/log.jsonl")).read_text().splitlines()]
    timed = ("steps_per_s", "clips_per_s", "memory_gb", "hours_left")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def losses(results: Path) -> list[float]:
    return [line["loss"] for line in log_lines(results)]


def assert_equal(ours: dict, theirs: dict, tolerance: float = 0.0) -> None:
    for kind in ("model", "ema"):
        for name, value in theirs[kind].items():
            torch.testing.assert_close(ours[kind][name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("stills", "number"), [(0, signal.SIGTERM), (2, signal.SIGINT)])
def test_resumed_run_equals_the_unbroken_one_bit_for_bit(latents, tmp_path, stills, number):
    """Weights, EMA, optimizer, schedule, data order, noise, label drop continue; with stills and accumulation."""
    options = dict(use_image_num=stills, gradient_accumulation_steps=2, lr_schedule="cosine", lr_warmup_steps=2)
    options["log_every"] = 4  # a line's mean spans the interruption
    unbroken = run(latents, tmp_path / "unbroken", **options)
    cut = config(latents, tmp_path / "resumed", **options)
    stop_after(cut, 3, number)
    assert list((tmp_path / "resumed").glob("*/resume/0000003.pt"))
    assert not list((tmp_path / "resumed").glob("*/checkpoints/0000003.pt")), "a signal saves the resume state only"
    resumed = run(latents, tmp_path / "resumed", **options)
    assert_equal(resumed, unbroken)
    assert log_lines(tmp_path / "resumed") == log_lines(tmp_path / "unbroken")


FLOW = dict(process="flow", prediction="v", learn_sigma=False, time_sampling="logit-normal", time_shift=3.0)


@pytest.mark.parametrize(
    "options", [FLOW | dict(optimizer="muon", min_snr=5.0), FLOW | dict(prediction="x0", mixed_precision="bf16")]
)
def test_a_flow_and_muon_resume_bit_for_bit(latents, tmp_path, options):
    options = options | dict(lr_schedule="wsd", weight_decay=0.1)
    unbroken = run(latents, tmp_path / "unbroken", **options)
    stop_after(config(latents, tmp_path / "resumed", **options), 3)
    assert_equal(run(latents, tmp_path / "resumed", **options), unbroken)
    assert log_lines(tmp_path / "resumed") == log_lines(tmp_path / "unbroken")


def test_a_flow_sees_shifted_logit_normal_times(latents, tmp_path):
    """Real t = 1000 s of every clip, each from the clip's own generator; the labels are those of other objectives."""
    seen = []

    class Recorder(Flow):
        def training_losses(self, model, x, t, kwargs, noise, min_snr):
            seen.append((t, kwargs["y"], min_snr))
            return super().training_losses(model, x, t, kwargs, noise, min_snr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion.Flow", Recorder)
        run(latents, tmp_path / "flow", **FLOW, min_snr=2.0, max_train_steps=100, ckpt_every=100, log_every=100)
    t = torch.cat([t for t, _, _ in seen]).double() / 1000
    assert len(t) == 400 and t.unique().numel() > 390 and {gamma for *_, gamma in seen} == {2.0}
    normal = t.logit() - math.log(3)
    assert normal.mean().abs() < 0.2 and normal.std().item() == pytest.approx(1, abs=0.12)
    # the first clips draw as they would alone
    expected = []
    for clip in range(4):
        generator = torch.Generator().manual_seed(clip_seed(3407, clip))
        torch.empty(4, 4, 4, 4).normal_(generator=generator)
        expected.append(torch.empty(()).normal_(generator=generator).sigmoid().item())
    assert (t[:4] / (3 - 2 * t[:4])).tolist() == pytest.approx(expected, abs=1e-5)


def test_muon_takes_the_matrices_of_blocks_and_skips_and_adamw_the_rest(latents, tmp_path):
    """Each as the library's optimizer alone; Muon's steps have Adam's size and nearly equal singular values."""
    cfg = config(latents, tmp_path, optimizer="muon", weight_decay=0.01)
    torch.manual_seed(0)
    latte = create_model(cfg, torch.device("cpu"))
    twin = copy.deepcopy(latte)
    optimizer = create_optimizer(cfg, latte)
    by_name = dict(twin.named_parameters())
    matrices = [n for n, p in by_name.items() if n.split(".")[0] in ("blocks", "skip_linears") and p.ndim == 2]
    others = [n for n, p in by_name.items() if n not in matrices and p.requires_grad]
    assert len(matrices) == 8 * 5 + 2 and "y_embedder.embedding_table.weight" in others
    shared = dict(lr=cfg.learning_rate, weight_decay=0.01)
    muon = torch.optim.Muon([by_name[n] for n in matrices], adjust_lr_fn="match_rms_adamw", **shared)
    adamw = torch.optim.AdamW([by_name[n] for n in others], fused=True, **shared)
    before = by_name["blocks.0.mlp.fc1.weight"].detach().clone()
    for step in range(3):
        for model in (latte, twin):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                if p.requires_grad:
                    p.grad = torch.randn(p.shape, generator=generator)
        set_learning_rate(optimizer, cfg, step + 1)
        for each in (optimizer, muon, adamw):
            each.step()
        if step == 0:
            update = (by_name["blocks.0.mlp.fc1.weight"] - before * (1 - 0.01 * cfg.learning_rate)).detach()
            values = torch.linalg.svdvals(update)
            assert values.max() / values.min() < 2.5
            assert update.square().mean().sqrt() == pytest.approx(0.2 * cfg.learning_rate, rel=0.3)
    for name, p in latte.named_parameters():
        assert torch.equal(p, by_name[name]), name
    assert {group["lr"] for group in optimizer.param_groups} == {cfg.learning_rate}
    optimizer.zero_grad()
    assert all(p.grad is None for p in latte.parameters())


def test_muon_skips_an_overflow_of_fp16(latents, tmp_path):
    """Under a gradient scaler both parts see unscaled gradients, and neither steps on an infinite one."""
    cfg = config(latents, tmp_path, optimizer="muon")
    results = {}
    for scaled in (False, True):
        torch.manual_seed(0)
        latte = create_model(cfg, torch.device("cpu"))
        optimizer, scaler = create_optimizer(cfg, latte), torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
        trained = [p for p in latte.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        scaler.scale(sum((p * torch.randn(p.shape, generator=generator)).sum() for p in trained)).backward()
        scaler.step(optimizer)
        scaler.update()
        results[scaled] = [p.detach().clone() for p in trained]
    assert all(map(torch.equal, *results.values()))
    trained[0].grad.fill_(math.inf)
    scaler.step(optimizer)
    assert all(map(torch.equal, trained, results[True]))


def test_a_run_is_not_continued_with_another_optimizer(latents, tmp_path):
    for first, second in (("adamw", "muon"), ("muon", "adamw")):
        results = tmp_path / first
        run(latents, results, optimizer=first, max_train_steps=2)
        with pytest.raises(UserError, match=f"has other weights, as it has other options: optimizer={first}, not"):
            run(latents, results, optimizer=second, resume_from_checkpoint=next(results.iterdir()))


@pytest.mark.slow
def test_two_processes_of_a_flow_with_muon_equal_one(latents, tmp_path):
    """To 1e-3: Muon's products are in bf16, which magnifies the last bit of a gradient's sum."""
    options = FLOW | dict(optimizer="muon", min_snr=5.0)
    run(latents, tmp_path / "one", **{**SHARED, **options, "local_batch_size": 4, "max_train_steps": 12})
    finish(torchrun(latents, tmp_path / "two", **options, max_train_steps=12))
    assert_equal(newest(tmp_path / "two"), newest(tmp_path / "one"), tolerance=1e-3)


def test_stale_features_train_cached_steps_and_change_no_other_draw(latents, tmp_path):
    """Half of the clips have a noisier deep feature; the run resumes exactly; a share of 0 is the plain run."""
    seen = []

    class Recorder(StaleFeatures):
        def forward(self, x, t, x_deep, t_deep, y):
            seen.append((t, t_deep, y))
            return super().forward(x, t, x_deep, t_deep, y)

    options = dict(stale_features=0.5, stale_gap=100, max_train_steps=30, ckpt_every=30, log_every=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "StaleFeatures", Recorder)
        unbroken = run(latents, tmp_path / "stale", **options)
    t, t_deep, _ = (torch.cat(column) for column in zip(*seen, strict=True))
    gaps = (t_deep - t)[t < 899]
    assert 0.35 < (gaps > 0).float().mean() < 0.65 and gaps.min() == 0 and 80 < gaps.max() <= 100
    assert t_deep.max() <= 999

    cut = config(latents, tmp_path / "resumed", **options)
    stop_after(cut, 3)
    assert_equal(run(latents, tmp_path / "resumed", **options), unbroken)

    plain = []

    def losses_of(model, x, t, kwargs, noise, min_snr):
        plain.append((t, kwargs["y"]))
        return {"loss": t.float()}

    batch = {"video": torch.randn(4, 4, 8, 4, 4), "label": torch.tensor([0, 1, 0, 1])}
    for share in (0.0, 0.5):
        cfg = config(latents, tmp_path, stale_features=share)
        process = make_diffusion(cfg)
        process.training_losses = losses_of
        program.clip_losses(None, process, None, batch, 0, cfg, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(*plain, strict=True)), "timesteps and labels stay"


def test_stale_features_with_stills_are_refused(latents, tmp_path):
    with pytest.raises(UserError, match="stale_features: stills have no place in cached steps; use use_image_num=0"):
        check_training_options(config(latents, tmp_path, stale_features=0.5, use_image_num=2))


def test_stale_features_deeper_than_the_model_are_refused_before_there_is_a_run(latents, tmp_path):
    with pytest.raises(UserError, match=r"cache\.depth: 3 is outside 1 \.\.\. 2"):
        check_training_options(config(latents, tmp_path, **{"stale_features": 0.5, "cache.depth": 3}))


def stop_after(cfg: TrainConfig, step: int, number: int = signal.SIGTERM) -> None:
    """Train until a signal that arrives in the middle of `step`."""
    count, original = 0, program.clip_losses

    def counting(*args, **kwargs):
        nonlocal count
        count += 1
        if count == step * cfg.gradient_accumulation_steps:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    program.clip_losses = counting
    try:
        assert train(cfg) == 128 + number, "as after any signal: `train && sample` stops"
    finally:
        program.clip_losses = original
        AcceleratorState._reset_state(reset_partial_state=True)


def torchrun(latents: Path, results: Path, **options) -> subprocess.Popen:
    """train.py with SHARED on two gloo ranks, Hugging Face's `datasets` installed: accelerate would import ours."""
    fake = results.parent / "site" / "datasets-4.0.0.dist-info"
    fake.mkdir(parents=True, exist_ok=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 4.0.0\n")
    options = {**TINY, **SHARED, "latents_path": latents, "results_dir": results, **options}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    command += [f"{key}={value}" for key, value in options.items()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(fake.parent)}
    return subprocess.Popen(command, env=env, cwd=results.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()[-2000:]


def wait_for_step(process: subprocess.Popen, results: Path, step: int) -> None:
    while not any(f'"step": {step},' in log.read_text() for log in results.glob("*/log.jsonl")):
        assert process.poll() is None, process.stdout.read().decode()[-2000:]
        time.sleep(0.002)


def kill_9(process: subprocess.Popen) -> None:
    """The whole tree at once: torchrun, ranks, data workers."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        member.kill()
    psutil.wait_procs(tree[1:], timeout=300)
    process.communicate(timeout=300)


@pytest.fixture(scope="module")
def unbroken(latents, tmp_path_factory) -> Path:
    """A run on two ranks from end to end."""
    results = tmp_path_factory.mktemp("two_ranks") / "unbroken"
    finish(torchrun(latents, results))
    return results


@pytest.mark.slow
def test_two_processes_equal_one(latents, unbroken, tmp_path):
    """Half of the batch on each of two gloo ranks: equal to 1e-5."""
    run(latents, tmp_path, **{**SHARED, "local_batch_size": 4})
    assert_equal(weights(unbroken, step=12), weights(tmp_path, step=12), tolerance=1e-5)


@pytest.mark.slow
def test_run_goes_on_with_another_number_of_processes(latents, unbroken, tmp_path):
    """Twelve steps on one process, the rest on two: equal to 1e-5 to two all the way."""
    stop_after(config(latents, tmp_path / "runs", **{**SHARED, "local_batch_size": 4}), 12)
    finish(torchrun(latents, tmp_path / "runs", resume_from_checkpoint=next(tmp_path.glob("runs/*"))))
    assert [line["step"] for line in log_lines(tmp_path / "runs")] == list(range(1, 37))
    assert_equal(newest(tmp_path / "runs"), newest(unbroken), tolerance=1e-5)


@pytest.mark.slow
def test_killed_and_signalled_runs_on_two_ranks_equal_the_unbroken_one_bit_for_bit(latents, unbroken, tmp_path):
    """kill -9 between two checkpoints, then SIGTERM to torchrun: the same command continues, and logs no step twice."""
    broken, chosen = tmp_path / "broken", random.Random(0)
    killed = torchrun(latents, broken)
    wait_for_step(killed, broken, chosen.randrange(13, 19))
    kill_9(killed)
    assert [path.stem for path in broken.glob("*/resume/*")] == ["0000012"], "steps are lost"

    stopped = torchrun(latents, broken)
    wait_for_step(stopped, broken, chosen.randrange(25, 30))
    stopped.terminate()  # torchrun's own process, which hands it on
    stopped.communicate(timeout=300)
    last = max(int(path.stem) for path in broken.glob("*/resume/*"))
    assert last % 12 and last == log_lines(broken)[-1]["step"], "nothing is lost"

    finish(torchrun(latents, broken))
    assert [line["step"] for line in log_lines(broken)] == list(range(1, 37))
    assert log_lines(broken) == log_lines(unbroken)
    assert_equal(newest(broken), newest(unbroken))


def test_line_cut_short_by_a_crash_goes_with_those_of_lost_steps(latents, tmp_path):
    run(latents, tmp_path, max_train_steps=4)
    log = next(tmp_path.glob("*/log.jsonl"))
    log.write_text(log.read_text() + '{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    run(latents, tmp_path)
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_run_has_one_writer(latents, tmp_path):
    """The same command beside a living training is an error; beside a killed one it is not."""
    run(latents, tmp_path, max_train_steps=2)
    lock = next(tmp_path.iterdir()) / ".lock"
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another process trains in"):
            run(latents, tmp_path)
        other.kill()
    run(latents, tmp_path)


def test_training_draws_nothing_from_the_global_generator(latents, tmp_path):
    """So there is no generator's state to resume: each clip has its own."""
    run(latents, tmp_path / "short", max_train_steps=1)
    state = torch.get_rng_state()
    run(latents, tmp_path / "long", max_train_steps=6, use_image_num=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_damaged_resume_state_is_passed_over_for_the_one_before(latents, tmp_path, capsys):
    unbroken = run(latents, tmp_path / "a")
    run(latents, tmp_path / "b", max_train_steps=4)
    state = next((tmp_path / "b").glob("*/resume/0000004.pt"))
    state.write_bytes(state.read_bytes()[:1000])
    state.rename(state.with_stem("0000009"))
    resumed = run(latents, tmp_path / "b", keep_resume_states=1)
    assert "passed over" in capsys.readouterr().out
    assert_equal(resumed, unbroken)
    assert [path.stem for path in state.parent.iterdir()] == ["0000006"], "the broken one outlives the good one"


def test_other_options_start_another_run_which_says_why(latents, tmp_path, capsys):
    run(latents, tmp_path, max_train_steps=2)
    assert "a new run" not in capsys.readouterr().out
    run(latents, tmp_path, max_train_steps=2, global_seed=1)
    assert [path.name[:3] for path in sorted(tmp_path.iterdir())] == ["000", "001"]
    reason = "a new run, as 000-Latte-skip-video_folder has global_seed=3407, not 1 (resume_from_checkpoint="
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize("change", [dict(hidden_size=32), dict(train_only="skip")])
def test_run_of_other_weights_is_not_continued(latents, tmp_path, change):
    run(latents, tmp_path, max_train_steps=2)
    key, value = next(iter(change.items()))
    with pytest.raises(UserError, match=f"has other weights, as it has other options: {key}=.*, not {value}$"):
        run(latents, tmp_path, **change, resume_from_checkpoint=next(tmp_path.iterdir()))


CLASS_CHANGES = {  # what happens to the folders a and b -> what the error says
    "renamed": (
        {"a": "z"},
        "a gone; z new; label 0 was a, is b; label 1 was b, is z; rename the folders back, or start",
    ),
    "renamed in place": ({"b": "c"}, "b gone; c new; label 1 was b, is c; rename"),
    "swapped by case": ({"a": "c", "b": "A"}, "a, b gone; A, c new; label 0 was a, is A; label 1 was b, is c; rename"),
}


@pytest.mark.parametrize("change", CLASS_CHANGES)
def test_a_run_does_not_go_on_with_other_classes(latents, tmp_path, change):
    """Folders renamed between a run and its continuation would shift labels; nothing of the run is lost."""
    shutil.copytree(latents, tmp_path / "latents")
    names, message = CLASS_CHANGES[change]
    unbroken = run(latents, tmp_path / "unbroken")
    run(tmp_path / "latents", tmp_path / "runs", max_train_steps=4)
    for old, new in names.items():
        (tmp_path / "latents" / old).rename(tmp_path / "latents" / new)
    log = next(tmp_path.glob("runs/*/log.jsonl")).read_text()
    with pytest.raises(UserError, match=rf"^data_path: the classes are no longer those of .*/000-\S+: {message}"):
        run(tmp_path / "latents", tmp_path / "runs")
    assert next(tmp_path.glob("runs/*/log.jsonl")).read_text() == log
    for old, new in names.items():
        (tmp_path / "latents" / new).rename(tmp_path / "latents" / old)
    assert_equal(run(tmp_path / "latents", tmp_path / "runs"), unbroken)


def test_a_state_without_the_classes_is_continued(latents, tmp_path):
    """Runs of earlier versions of this code did not save the names."""
    unbroken = run(latents, tmp_path / "unbroken")
    run(latents, tmp_path / "runs", max_train_steps=4)
    path = next(tmp_path.glob("runs/*/resume/0000004.pt"))
    state = torch.load(path)
    assert state.pop("classes") == ["a", "b"]
    torch.save(state, path)
    assert_equal(run(latents, tmp_path / "runs"), unbroken)


def test_validation_clips_have_the_classes_of_training(tiny, latents, tmp_path):
    for name in ("a", "c"):
        (tmp_path / "clips" / name).mkdir(parents=True)
        shutil.copy(next(ROOT.glob("datasets/demo/test/*/*_c01.mp4")), tmp_path / "clips" / name)
    options = dict(pretrained_model_path=tiny.parent, validation_every=1, validation_path=tmp_path / "clips")
    message = r"^validation_path: .* has other classes than .*: b gone; c new; label 1 was b, is c$"
    with pytest.raises(UserError, match=message):
        run(latents, tmp_path / "runs", **options)


def test_every_process_must_find_the_same_clips(latents, monkeypatch, tmp_path):
    """A disk that fails on one machine would mix up the ranks' shares."""
    dataset = get_dataset(config(latents, tmp_path))
    first: list[object] = []
    monkeypatch.setattr("tools.common.training.broadcast_object_list", lambda mine: first or mine)
    check_same_clips(dataset)
    first.append((7, "another hash"))
    with pytest.raises(UserError, match=r"^data_path: the 6 clips here are not the 7 clips that process 0"):
        check_same_clips(dataset)


def test_skipped_files_are_named_in_the_runs_log(latents, tmp_path):
    """Once each, with their count."""
    shutil.copytree(latents, tmp_path / "latents")
    (tmp_path / "latents" / "a" / "broken.mp4.safetensors").write_text("no latents")
    run(tmp_path / "latents", tmp_path / "runs", max_bad_fraction=0.5)
    lines = next(tmp_path.glob("runs/*/log.txt")).read_text().splitlines()
    named = [line for line in lines if "broken.mp4" in line]
    assert len(named) == 1 and "is no file of latents" in named[0] and named[0].endswith("unusable files so far: 1")


def test_accumulation_and_gradient_checkpointing_equal_the_plain_run(latents, tmp_path):
    """Two half batches are one, and recomputed activations are the same ones: to 1e-5.

    At a learning rate that leaves room for another processor: at 1e-2 rounding grows to 1e-5 within the six steps.
    """
    options = dict(learning_rate=1e-3)
    plain = run(latents, tmp_path / "plain", **options)
    halves = run(latents, tmp_path / "halves", local_batch_size=2, gradient_accumulation_steps=2, **options)
    assert_equal(halves, plain, tolerance=1e-5)
    assert_equal(run(latents, tmp_path / "recomputed", gradient_checkpointing=True, **options), plain, tolerance=1e-5)


def test_identity_start_of_skips_beats_xavier_on_a_latte_trunk(latents, tmp_path):
    """A Latte trained without skips, loaded into a skip model: the identity start has the lower first loss."""
    plain = tmp_path / "plain"
    run(latents, plain, model="Latte-XL/2", max_train_steps=60, learning_rate=3e-3, ckpt_every=60)
    checkpoint = next(plain.glob("*/checkpoints/0000060.pt"))
    first = {}
    for start in ("identity", "xavier"):
        run(latents, tmp_path / start, pretrained=checkpoint, skip_init=start, max_train_steps=1, local_batch_size=16)
        first[start] = losses(tmp_path / start)[0]
    trunk = losses(plain)[-1]
    assert first["identity"] < first["xavier"]
    assert abs(first["identity"] - trunk) < abs(first["xavier"] - trunk)


def test_identity_start_passes_the_stream_on(latents):
    """After it, a skip model's output stays closer to the trunk's than a Xavier start's."""
    torch.manual_seed(0)
    options = {**TINY, "extras": 2, "latents_path": latents}
    trunk = get_models(load_config(TrainConfig, None, [f"{k}={v}" for k, v in (options | {"num_skips": 0}).items()]))
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = get_models(load_config(TrainConfig, None, [f"{k}={v}" for k, v in options.items()]))
    model.load_state_dict(trunk.state_dict(), strict=False)
    x, t, y = torch.randn(4, 4, 4, 4, 4), torch.tensor([10, 300, 600, 990]), torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        wanted = trunk(x, t, y)
        xavier = (model(x, t, y) - wanted).norm()
        init_skips_as_identity(model, x, t, y)
        identity = (model(x, t, y) - wanted).norm()
    assert identity < 0.5 * xavier


def test_identity_start_stays_on_the_models_device():
    """Of a GPU that is only pretended: shapes and devices without data."""
    fake = FakeTensorMode()
    with fake, torch.device("cuda:0"):  # the model's; what a function makes without a word is on the CPU
        model = get_models(load_config(TrainConfig, None, [f"{k}={v}" for k, v in TINY.items()]))
        x, t, y = torch.randn(2, 4, 4, 4, 4), torch.tensor([10, 990]), torch.tensor([0, 1])
    with fake:
        init_skips_as_identity(model, x, t, y)


@pytest.mark.parametrize(
    ("train_only", "named"),
    [
        ("skip", lambda name: name.startswith("skip_")),
        ("temporal", lambda name: name.startswith(("blocks.1.", "blocks.3.", "blocks.5.", "blocks.7."))),
    ],
)
def test_train_only_moves_what_it_names(latents, tmp_path, train_only, named):
    start = run(latents, tmp_path / "all")["ema"]  # what `pretrained` loads
    checkpoint = next((tmp_path / "all").glob("*/checkpoints/0000006.pt"))
    end = run(latents, tmp_path / "some", train_only=train_only, pretrained=checkpoint, max_train_steps=2)["ema"]
    assert {name for name in end if not torch.equal(start[name], end[name])} <= {name for name in end if named(name)}
    assert any(not torch.equal(start[name], end[name]) for name in end)


def test_run_without_finite_losses_stops_and_says_so(latents, tmp_path):
    """And how to go on: with another learning rate, `auto` alone would start anew."""
    with pytest.raises(UserError, match=r"^3 steps in a row .*max_bad_steps.* resume_from_checkpoint=.*/000-Latte-sk"):
        run(latents, tmp_path, learning_rate=1e38, max_bad_steps=3, ckpt_every=1, max_train_steps=50)
    assert [path.stem for path in tmp_path.glob("*/checkpoints/*")] == ["0000001"], "no bad step is saved"


def test_guard_skips_a_bad_step_and_counts_those_in_a_row(tmp_path):
    """A loss or a norm that is not finite is bad; a good step ends the count; the log names each bad step."""
    guard = StepGuard(3, None, RunLog(tmp_path, 0))
    steps = [(1.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, 1.0), (math.inf, math.nan), (1.0, math.nan)]
    assert [guard.accepts(step, *each) for step, each in enumerate(steps)] == [True, False, False, True, False, False]
    assert guard.bad_steps == 2
    with pytest.raises(UserError, match=rf"^3 steps in a row .*resume_from_checkpoint={tmp_path}"):
        guard.accepts(6, math.nan, 1.0)
    assert (tmp_path / "log.txt").read_text().count("skipped, ") == 5


def test_guard_lets_a_scaler_search_its_scale(tmp_path):
    """An overflow of the gradient alone halves the scale and is not bad above scale 1; a loss of NaN is."""
    scaler = torch.amp.GradScaler("cpu", 8.0)
    guard = StepGuard(3, scaler, RunLog(tmp_path, 0))
    counts = []
    for loss in (1.0, 1.0, 1.0, math.nan):
        scaler.scale(torch.ones(()))  # as a backward pass does
        parameter = torch.nn.Parameter(torch.ones(()))
        parameter.grad = torch.tensor(math.inf)
        scaler.unscale_(torch.optim.SGD([parameter], 1.0))
        assert not guard.accepts(1, loss, math.inf)
        counts.append((scaler.get_scale(), guard.bad_steps))
    assert counts == [(4.0, 0), (2.0, 0), (1.0, 1), (0.5, 2)]


class ScaledOnCpu(Accelerator):
    """fp16's gradient scaler on gradients of fp16's range: fp16 itself a CPU computes in software only."""

    init_scale, round_gradient = 2.0**24, staticmethod(lambda gradient: gradient.half().float())

    def __init__(self, **options):
        super().__init__(**options)
        self.scaler = torch.amp.GradScaler("cpu", self.init_scale)

    def prepare(self, model, optimizer):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self.round_gradient)
        return super().prepare(model, optimizer)

    def unscale_gradients(self):
        self.scaler.unscale_(self._optimizers[0].optimizer)


def test_scaler_that_finds_its_scale_is_no_bad_run_and_resumes(latents, tmp_path, monkeypatch):
    """More overflows in a row than max_bad_steps; cut in their midst, the run equals the unbroken one bit for bit."""
    monkeypatch.setattr("train.Accelerator", ScaledOnCpu)
    options = dict(max_bad_steps=2, max_train_steps=14)
    unbroken = run(latents, tmp_path / "unbroken", **options)
    assert next(tmp_path.glob("unbroken/*/log.txt")).read_text().count("skipped, ") > 3
    stop_after(config(latents, tmp_path / "resumed", **options), 3)
    assert_equal(run(latents, tmp_path / "resumed", **options), unbroken)
    ends = [torch.load(next(tmp_path.glob(f"{name}/*/resume/0000014.pt"))) for name in ("unbroken", "resumed")]
    assert ends[0]["scaler"] == ends[1]["scaler"] and ends[0]["scaler"]["scale"] < 2.0**20


def test_scaler_at_the_end_of_its_scale_stops_the_run(latents, tmp_path, monkeypatch):
    """Gradients that overflow at scale 1 are the run's fault: 8, 4, 2 are tried, then three count."""
    monkeypatch.setattr("train.Accelerator", ScaledOnCpu)
    monkeypatch.setattr(ScaledOnCpu, "init_scale", 8.0)
    monkeypatch.setattr(ScaledOnCpu, "round_gradient", staticmethod(lambda gradient: gradient * torch.inf))
    with pytest.raises(UserError, match=r"^3 steps in a row"):
        run(latents, tmp_path, max_bad_steps=3, max_train_steps=50)
    assert next(tmp_path.glob("*/log.txt")).read_text().count("skipped, ") == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_classes=3), "2 class folders, but num_classes is 3"),
        (dict(image_size=64), "made with image_size=32, not 64"),
        (dict(latents_path="/nowhere"), "latents_path: nothing at /nowhere; make them with tools/encode_latents.py"),
        (dict(preview_every=1, pretrained_model_path=ROOT / "pretrained/demo"), "are of another VAE, tiny"),
        (
            dict(preview_every=1, pretrained_model_path=ROOT / "pretrained/demo", in_channels=8),
            "in_channels: 8, but the latents of AutoencoderKL have 4 channels",
        ),
        (dict(resume_from_checkpoint="/nowhere"), "is no run folder"),
        (dict(pretrained="/nowhere.pt"), "no checkpoint /nowhere.pt"),
        (dict(mixed_precision="fp16"), "fp16 runs in software on a CPU"),
    ],
)
def test_errors_are_one_line(latents, tmp_path, options, message):
    with pytest.raises(UserError, match=message) as caught:
        run(latents, tmp_path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "lr_schedule=cosin",
        "train_only=tempora",
        "mixed_precision=fp8",
        "skip_init=zero",
        "attention_mode=flash",
        "ckpt_every=0",
        "num_frames=0",
        "num_workers=-1",
        "global_seed=-1",
        "train_only=skip model=Latte",
        "sample_method=ddmi preview_every=1",
        "num_sampling_steps=0 preview_every=1",
        "cfg_scale=7 preview_every=1",
        "cache.depth=9 model=Latte-skip preview_every=1",
    ],
)
def test_unusable_option_is_one_line_that_names_it(override):
    """Before anything runs, those of the previews too."""
    with pytest.raises(UserError, match=override.partition("=")[0]) as caught:
        check_training_options(load_config(TrainConfig, None, override.split()))
    assert "\n" not in str(caught.value)


def script_commands(tmp_path: Path, script: str, processes: int, *options: str) -> list[list[str]]:
    """The command lines that a script starts, written down by a stand-in for python3."""
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\nprintf "%s\\t" "${0##*/}" "$@" >> commands; echo >> commands\n')
    python.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NPROC": str(processes)}
    subprocess.run(["bash", ROOT / script, *options, "max_train_steps=7"], cwd=tmp_path, env=env, check=True)
    return [line.split("\t")[:-1] for line in (tmp_path / "commands").read_text().splitlines()]


@pytest.mark.parametrize("task", ["ucf101", "taichi", "sky", "ffs", "demo"])
def test_train_scripts_run_train(tmp_path, monkeypatch, capsys, task):
    """With their YAML file and what follows their name, from any directory; a dry run speaks on one rank.

    It says what it misses, as nobody has put the paths of the data in.
    """
    commands = script_commands(tmp_path, f"train_scripts/{task}_train.sh", processes=3)
    if task == "demo":
        command, programs = commands[1][1:], [Path(command[1]).name for command in commands]
        assert programs == ["encode_latents.py", "train.py"] and commands[0][2:] == commands[1][2:]
    else:
        assert Path(commands[0][1]).samefile(ROOT / "sample/scripts/torchrun.py")
        assert commands[0][2:4] == ["--standalone", "--nproc_per_node=3"]
        command = commands[0][4:]
    assert Path(command[0]).samefile(program.__file__)
    monkeypatch.setattr(
        sys, "argv", [*command, "--dry-run", f"results_dir={tmp_path}", f"latents_path={tmp_path / 'latents'}"]
    )
    monkeypatch.setenv("RANK", "1")
    program.main()
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=f"^latents_path: nothing at {tmp_path}/latents"):
        program.main()
    out = capsys.readouterr().out
    assert out.startswith("# model: Latte") and "# steps: 1 to 7\n" in out and "\nmax_train_steps: 7\n" in out


def dry_run(monkeypatch, folder: Path, cfg: TrainConfig) -> None:
    """train.py --dry-run with options from a file in `folder`."""
    (folder / "dry.yaml").write_text(to_yaml(cfg))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(folder / "dry.yaml"), "--dry-run"])
    program.main()


def test_dry_run_says_what_would_run_and_makes_nothing(latents, tmp_path, monkeypatch, capsys):
    """A new run at first, then the one to continue, then the one that is finished."""
    cfg = config(latents, tmp_path / "runs", gradient_accumulation_steps=2, train_only="skip")
    dry_run(monkeypatch, tmp_path, cfg)
    lines = capsys.readouterr().out.splitlines()
    model = get_models(cfg)
    trained = sum(p.numel() for name, p in model.named_parameters() if name.startswith("skip_"))
    size = sum(p.numel() for p in model.parameters())
    assert lines[0] == f"# model: Latte-skip, {size:,} parameters, {trained:,} to train, mixed_precision no"
    assert lines[1] == "# vae: AutoencoderKL, 4 frames of 32 x 32 -> latents 4 x 4 x 4 x 4"
    assert lines[2] == f"# data: 6 clips in {latents}"
    assert lines[3] == "# batch: 8 clips a step, 4 a forward x 2 forwards x 1 processes"
    assert lines[4:6] == ["# steps: 1 to 6", f"# run: in {tmp_path}/runs, a new run"]
    assert not (tmp_path / "runs").exists()

    run(latents, tmp_path / "runs", gradient_accumulation_steps=2, train_only="skip", max_train_steps=4)
    capsys.readouterr()
    dry_run(monkeypatch, tmp_path, cfg)
    lines = capsys.readouterr().out.splitlines()
    assert lines[4:6] == ["# steps: 5 to 6", f"# run: continues {tmp_path}/runs/000-Latte-skip-video_folder"]
    dry_run(monkeypatch, tmp_path, replace(cfg, max_train_steps=4))
    assert "# steps: none, the run is finished at step 4" in capsys.readouterr().out
    dry_run(monkeypatch, tmp_path, replace(cfg, global_seed=1))
    assert "a new run, as 000-Latte-skip-video_folder has global_seed=3407, not 1 (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(latents_path="", data_path="/nowhere"), "data_path: nothing at /nowhere"),
        (dict(latents_path="/nowhere"), "latents_path: nothing at /nowhere"),
        (dict(latents_path="", vae="other"), "no VAE in .*/other"),
        (dict(preview_every=1, vae="other"), "no VAE in .*/other"),
        (dict(pretrained="/nowhere.pt"), "pretrained: nothing at /nowhere.pt"),
        (dict(validation_every=1), "validation_path is not set"),
        (dict(validation_every=1, validation_path="/nowhere"), "validation_path: nothing at /nowhere"),
        (dict(latents_path="", use_image_num=1, frame_data_txt="/nowhere.txt"), "frame_data_txt: nothing at /nowhere"),
        (dict(results_dir="FILE/runs"), "results_dir: .* is a file"),
    ],
)
def test_dry_run_names_the_file_that_is_missing(tiny, latents, tmp_path, monkeypatch, options, message):
    """And no other: the rest is there."""
    (tmp_path / "file").write_text("")
    shutil.copytree(ROOT / "datasets/demo/test", tmp_path / "clips", ignore=lambda _, names: sorted(names)[2:])
    there = dict(latents_path=latents, data_path=tmp_path / "clips", pretrained_model_path=tiny.parent)
    options = {key: str(value).replace("FILE", f"{tmp_path}/file") for key, value in options.items()}
    cfg = config(latents, tmp_path / "runs", **(there | options))
    with pytest.raises(UserError, match=f"^{message}") as caught:
        dry_run(monkeypatch, tmp_path, cfg)
    assert "; " not in str(caught.value).replace("; make them", "")


def test_dry_run_with_a_missing_file_ends_with_exit_1(latents, tmp_path):
    command = [sys.executable, ROOT / "train.py", "--dry-run", f"latents_path={latents}", "preview_every=1"]
    command += [*(f"{key}={value}" for key, value in TINY.items()), "vae=other", "pretrained_model_path=/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout.startswith("# model: Latte-skip, ")
    assert done.stderr.startswith("error: no VAE in /other: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["train_scripts/ucf101_train.sh", "sample/scripts/ucf101/ucf101_skip.sh"])
def test_one_process_is_started_without_torchrun(tmp_path, script):
    [command] = script_commands(tmp_path, script, processes=1)
    assert Path(command[1]).name in ("train.py", "sample_ddp.py") and command[-1] == "max_train_steps=7"


def test_a_dry_run_is_started_without_torchrun(tmp_path):
    [command] = script_commands(tmp_path, "train_scripts/ucf101_train.sh", 3, "--dry-run")
    assert Path(command[1]).name == "train.py" and command[-2:] == ["--dry-run", "max_train_steps=7"]


def test_error_ends_the_program_with_exit_1():
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "ckpt_every=0"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("schedule", "after_warmup"),
    [("linear", [1 - i / 10 for i in range(1, 11)]), ("wsd", [1.0] * 8 + [0.5, 0.0])],
)
def test_learning_rate_warms_up_and_decays(latents, tmp_path, schedule, after_warmup):
    cfg = config(latents, tmp_path, lr_schedule=schedule, lr_warmup_steps=4, max_train_steps=14, learning_rate=1.0)
    rates = [learning_rate(cfg, step) for step in range(1, 15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx(after_warmup)


def test_clips_draw_from_generators_of_their_own():
    """Seeds of different clips and different runs differ."""
    assert len({clip_seed(seed, number) for seed in range(3) for number in range(1000)}) == 3000


@pytest.mark.slow
def test_compiled_blocks_equal_the_plain_run(latents, tmp_path):
    """To 1e-5 in fp32, also where activations are recomputed, and the names in the checkpoint stay plain."""
    options = dict(max_train_steps=2)
    plain = run(latents, tmp_path / "plain", **options)
    options["use_compile"] = True
    assert_equal(run(latents, tmp_path / "compiled", **options), plain, tolerance=1e-5)
    options["gradient_checkpointing"] = True
    assert_equal(run(latents, tmp_path / "recomputed", **options), plain, tolerance=1e-5)


def test_bf16_computes_in_half_precision_and_learns_in_full(latents, tmp_path):
    """Losses are near those of fp32 and not equal; weights, their average and the optimizer's state are fp32."""
    run(latents, tmp_path / "fp32")
    run(latents, tmp_path / "bf16", mixed_precision="bf16")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=2e-2)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
    state = torch.load(sorted(tmp_path.glob("bf16/*/resume/*.pt"))[-1])
    moments = {f"{i}.{name}": v for i, each in state["optimizer"]["state"].items() for name, v in each.items()}
    assert {v.dtype for part in (state["model"], state["ema"], moments) for v in part.values()} <= {
        torch.float32,
        torch.int64,  # how many updates the average has seen
    }


@pytest.mark.parametrize("stills", [0, 2])
def test_training_from_pixels_equals_training_from_encoded_latents(tiny, tmp_path, stills):
    """latents_path changes what is read, not what is learned (but for the half precision of the files)."""
    from tools.encode_latents import encode

    data = tmp_path / "clips"
    for source in sorted((ROOT / "datasets" / "demo" / "train").glob("*/*_c01.mp4"))[:2]:
        shutil.copytree(source.parent, data / source.parent.name, ignore=lambda _, names: sorted(names)[3:])
    options = dict(data_path=data, pretrained_model_path=tiny.parent, max_train_steps=2, local_batch_size=2)
    options["use_image_num"] = stills
    pixels = run("", tmp_path / "pixels", **options)
    encode(config(tmp_path / "latents", tmp_path, **options), Environment(0, 1, torch.device("cpu")))
    assert len(list((tmp_path / "latents").rglob("*.safetensors"))) == 6
    encoded = run(tmp_path / "latents", tmp_path / "encoded", **options)
    assert losses(tmp_path / "encoded") == pytest.approx(losses(tmp_path / "pixels"), rel=1e-3)
    assert_equal(encoded, pixels, tolerance=2e-2)


def test_finished_run_says_so(latents, tmp_path, capsys):
    run(latents, tmp_path, max_train_steps=2)
    run(latents, tmp_path, max_train_steps=2)
    assert "this run is finished" in capsys.readouterr().out


def test_previews_and_validation_look_on_and_change_nothing(tiny, latents, tmp_path):
    """Videos with and without cache, a loss on fixed clips, TensorBoard; the weights are those of a run without."""
    data = tmp_path / "clips"
    for name, source in zip("ab", sorted((ROOT / "datasets" / "demo" / "test").glob("*/*_c01.mp4")), strict=False):
        (data / name).mkdir(parents=True)
        shutil.copy(source, data / name)
    options = dict(max_train_steps=4, pretrained_model_path=tiny.parent, sample_method="ddim", num_sampling_steps=3)
    plain = run(latents, tmp_path / "plain", **options)
    watched = dict(preview_every=2, preview_clips=2, validation_every=2, validation_path=data, validation_clips=2)
    assert_equal(run(latents, tmp_path / "watched", **options, **watched), plain)
    folder = next((tmp_path / "watched").iterdir())
    names = sorted(path.name for path in (folder / "previews").iterdir())
    assert names == [f"{step:07d}-{plan}.mp4" for step in (2, 4) for plan in ("N2", "uncached")]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validated] == [2, 4]
    errors = [validated[-1][f"x0_mse_{log_snr}"] for log_snr in range(-6, 7, 2)]
    assert validated[-1]["x0_mse"] == pytest.approx(sum(errors) / 7) and min(errors) > 0
    assert list((folder / "tensorboard").iterdir())


def test_the_average_warms_up():
    """Decay min(beta, (1 + n) / (10 + n)) after n updates: 0.1, 2/11, ... up to beta."""
    module = torch.nn.Linear(1, 1, bias=False)
    update = EmaUpdate(0.25)
    average = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=update)
    average.update_parameters(module)  # copies
    expected = module.weight.item()
    for n, decay in enumerate([0.1, 2 / 11, 0.25, 0.25]):
        module.weight.data.fill_(n + 1.0)
        average.update_parameters(module)
        expected = decay * expected + (1 - decay) * (n + 1.0)
        assert average.module.weight.item() == pytest.approx(expected)


def test_a_short_run_has_an_average_that_is_trained(latents, tmp_path):
    """At the default decay, 20 steps leave the average near the weights, not near the start."""
    end = run(latents, tmp_path, ema_decay=0.9999, max_train_steps=20, ckpt_every=20)
    name = "final_layer.linear.weight"  # 0 at the start
    assert end["ema"][name].abs().mean() > 0.5 * end["model"][name].abs().mean() > 0


def test_a_run_from_before_the_warm_up_goes_on_without_it(latents, tmp_path, monkeypatch):
    """Bit for bit; its resume state has no word about a warm-up."""
    with monkeypatch.context() as patch:
        patch.setattr(EmaUpdate, "warms_up", property(lambda self: False, lambda self, value: None), raising=False)
        unbroken = run(latents, tmp_path / "old")
        run(latents, tmp_path / "cut", max_train_steps=4)
    path = next((tmp_path / "cut").glob("*/resume/0000004.pt"))
    state = torch.load(path, weights_only=True)
    assert state.pop("ema_warms_up") is False
    torch.save(state, path)
    assert_equal(run(latents, tmp_path / "cut"), unbroken)
    assert next((tmp_path / "cut").glob("*/resume/0000006.pt")) and len(list((tmp_path / "cut").iterdir())) == 1


def test_checkpoints_say_which_options_made_them(latents, tiny, tmp_path):
    """The classes are those of the folders."""
    end = run(latents, tmp_path, max_train_steps=2, pretrained_model_path=tiny.parent, prediction="v")
    options = end["options"]
    assert (options["prediction"], options["num_heads"], options["class_names"]) == ("v", 2, ["a", "b"])
    assert (options["step"], options["ema_decay"], options["num_frames"]) == (2, 0.5, 4)
    assert (options["dataset"], options["pretrained_model_path"]) == ("video_folder", str(tiny.parent))


def test_curves_go_where_report_to_says(latents, tmp_path, monkeypatch):
    """TensorBoard, Weights & Biases through accelerate, or neither; log.jsonl in any case."""
    logged = []

    class Run:
        def log(self, values, step, **_):
            logged.append((step, values["loss"]))

        def finish(self):
            logged.append("finished")

    def init(**options):
        logged.append((options["project"], options["name"], options["resume"]))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"report_to: import of wandb halted; .*: pip install wandb, or use"):
        check_training_options(config(latents, tmp_path, report_to="wandb"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for report_to in ("tensorboard", "wandb", "none"):
        run(latents, tmp_path / report_to, report_to=report_to, max_train_steps=2)
        folder = next((tmp_path / report_to).iterdir())
        assert (folder / "tensorboard").is_dir() == (report_to == "tensorboard")
        assert len((folder / "log.jsonl").read_text().splitlines()) == 2
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    project, *steps, end = logged
    assert project == ("skip-dit", "000-Latte-skip-video_folder", "allow") and end == "finished"
    assert steps == [(1, losses[0]), (2, losses[1])]


def test_a_report_line_says_the_time_left_in_words(tmp_path, capsys):
    log = RunLog(tmp_path, rank=0, report_to="none")
    log.report(7, loss=0.25, hours_left=162 / 3600)
    assert capsys.readouterr().out.endswith("] step 7  loss 0.25  2 min 42 s left\n")
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 7, "loss": 0.25, "hours_left": 162 / 3600}


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_progress_bar_on_a_terminal_only(latents, tmp_path, monkeypatch, capsys, on_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal, raising=False)
    run(latents, tmp_path, max_train_steps=2)
    captured = capsys.readouterr()
    assert ("2/2" in captured.err) == on_terminal and "step 2  " in captured.out
