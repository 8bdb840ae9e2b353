"""The way of a new user on tiny sizes: own clips, train, interrupt, resume, sample, look, evaluate; then in Python."""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import av
import pytest
import torch

import train
from sample import sample
from sample.media import save_video
from sample.pipeline import generate, load
from sample.similarity import psnr
from tests.conftest import own_process_state
from tools import evaluate, report
from tools.common.runs import RunLog

MODEL = "model=Latte-skip image_size=32 num_frames=4 num_classes=2 hidden_size=16 depth=8 num_heads=2 prediction=v"
RUN = "results_dir=results learning_rate=0.01 max_train_steps=20 ckpt_every=20 log_every=4 local_batch_size=2"
RUN += " num_workers=0 frame_interval=1"
SAMPLER = "sample_method=ddim num_sampling_steps=4 precision=fp32"


def call(monkeypatch, program, command: str) -> None:
    """Runs the main of a program; one that was interrupted may exit with a code."""
    monkeypatch.setattr(sys, "argv", [program.__file__, *command.split()])
    with own_process_state(), suppress(SystemExit):
        program.main()


def test_from_own_clips_to_a_score(tiny, tmp_path, monkeypatch, capsys):
    """No command names an option twice: the weights say what they are."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name, grey in (("ball", -0.5), ("cup", 0.5)):
        for i in range(3):
            save_video(f"clips/{name}/{i}.mp4", (grey + 0.2 * torch.rand(6, 3, 32, 32)).clamp(-1, 1), fps=8)

    # Train, interrupt with Ctrl-C in step 8, go on with the same command
    report_line = RunLog.report

    def interrupt(log: RunLog, step: int, **metrics: float) -> None:
        report_line(log, step, **metrics)
        if step == 8:
            os.kill(os.getpid(), signal.SIGINT)

    command = f"dataset=video_folder data_path=clips pretrained_model_path={tiny.parent} {MODEL} {RUN}"
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "report", interrupt)
        call(monkeypatch, train, command)
    assert "stopped by a signal; the same command continues" in capsys.readouterr().out
    call(monkeypatch, train, command)
    text = capsys.readouterr().out
    assert "steps 9 to 20" in text.replace("steps 10", "steps 9") and " left" in text
    (run,) = Path("results").iterdir()
    ckpt = run / "checkpoints/0000020.pt"

    # Sample by the checkpoint alone
    call(
        monkeypatch, sample, f"--ckpt {ckpt} --compare --cache N2 {SAMPLER} samples_per_class=2 save_video_path=videos"
    )
    record = json.loads(Path("videos/sample.json").read_text())
    assert (record["config"]["prediction"], record["config"]["num_classes"]) == ("v", 2)
    clips = sorted(path.name for path in Path("videos/N2").glob("0*.mp4"))
    assert clips == ["000000_ball.mp4", "000001_ball.mp4", "000002_cup.mp4", "000003_cup.mp4"]
    assert record["notes"] == [] and record["runs"][1]["psnr"] < 80  # the average of 20 steps is trained
    call(monkeypatch, sample, f"--config {run}/config.yaml --ckpt {ckpt} {SAMPLER} --classes Cup save_video_path=again")
    assert Path("again/uncached/000000_cup.mp4").is_file()

    # The page, and a score of the clips and of the checkpoint
    call(monkeypatch, report, f"videos {run} output=page.html")
    page = Path("page.html").read_text()
    assert page.count("data:video/mp4") == 8 and "N2" in page and "time left" in page
    common = "metrics=proxy real_path=clips real_stride=1 num_frames=4 image_size=32 num_fake=4 jackknife=0"
    common += " feature_path=null"
    call(monkeypatch, evaluate, f"{common} fake_path=videos/N2 output=score.json")
    assert json.loads(Path("score.json").read_text())["metrics"]["proxy"]["value"] > 0
    options = SAMPLER.replace("sample_method", "sample.sample_method").replace(" ", " sample.")
    call(monkeypatch, evaluate, f"{common} ckpt={ckpt} {options} sample.cache.full_steps=[0,2] output=own.json")
    fake = json.loads(Path("own.json").read_text())["fake"]
    assert fake["plan"]["steps"] == "FcFc" and fake["generate"]["prediction"] == "v"

    # In Python
    pipe = load(ckpt, "cpu", sample_method="ddim", num_sampling_steps=4, precision="fp32")
    (video,) = generate(pipe, seeds=[2], labels=["cup"], plan="N2")  # (4, 3, 32, 32)
    with av.open("videos/N2/000002_cup.mp4") as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert psnr(torch.stack(frames).movedim(-1, 1) / 127.5 - 1, video) > 20


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_an_untrained_model_is_doubted_not_praised(tiny, tmp_path, monkeypatch, capsys, weights):
    """Its final layer is zero, so every plan gives the clips of the uncached run."""
    monkeypatch.chdir(tmp_path)
    for name in ("ball", "cup"):
        save_video(f"clips/{name}/0.mp4", torch.rand(4, 3, 32, 32) * 2 - 1, fps=8)
    command = f"dataset=video_folder data_path=clips pretrained_model_path={tiny.parent} {MODEL} {RUN}"
    call(monkeypatch, train, f"{command} max_train_steps=1 learning_rate=1e-9")
    (ckpt,) = Path("results").glob("*/checkpoints/0000001.pt")
    call(monkeypatch, sample, f"--ckpt {ckpt} --compare --cache N2 {SAMPLER} weights={weights} save_video_path=videos")
    note = "2 cached clips are those of the uncached run to 80 dB, so metrics of their pixels say nothing of a"
    assert f"note: {note}" in capsys.readouterr().out
    assert json.loads(Path("videos/sample.json").read_text())["notes"][-1].startswith(note)
    call(monkeypatch, report, "videos")
    assert note in Path("videos/report.html").read_text()
