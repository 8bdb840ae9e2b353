"""What makes no sense is refused before any work: one line, exit code 2, nothing written, at a dry run, too."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import closed_to_us
from imageio_ffmpeg import _utils
from safetensors.torch import load_file

import train
from configs import ROOT, UserError, cli
from sample import sample, sample_ddp
from tools import encode_latents, evaluate, fidelity, sweep
from tools.demo import judge


def error_of(monkeypatch, program, *argv: str | Path) -> str:
    monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, argv)])
    with pytest.raises(UserError) as error:
        program.main()
    assert "\n" not in str(error.value)
    return str(error.value)


REFUSED = [
    ("eta=0.5 sample_method=ddpm", "eta: ddpm ignores eta=0.5; use sample_method=ddim or eta=0"),
    ("eta=0.5 sample_method=unipc", "eta: unipc ignores eta=0.5"),
    ("eta=1.5", "eta: 1.5 is outside 0 ... 1"),
    ("eta=nan", "eta: nan is not a finite number"),
    ("cfg_scale=nan", "cfg_scale: nan is not a finite number"),
    ("cfg_scale=1e9", "cfg_scale: 1000000000.0 is outside 0 ... 100"),
    ("cfg_scale=-1", "cfg_scale: -1.0 is outside 0 ... 100"),
    ("num_sampling_steps=1", "num_sampling_steps: the only timestep of 1 step is 0, where the model expects a clip"),
    ("num_sampling_steps=-5", "num_sampling_steps: -5 is less than 1"),
    ("image_size=0", "image_size: 0 is less than 1"),
    ("image_size=-64", "image_size: -64 is less than 1"),
    ("num_frames=-1", "num_frames: -1 is less than 1"),
    ("hidden_size=0", "hidden_size: 0 is less than 1"),
    ("seed=-1", "seed: -1 is less than 0"),
    ("seed=18446744073709551616", "seed: 18446744073709551616 does not fit into 64 bits"),
    ("fps=0", "fps: 0 is outside 1 ... 1000"),
    ("fps=100000", "fps: 100000 is outside 1 ... 1000"),
    ("vae_chunk_frames=0", "vae_chunk_frames: 0 is less than 1"),
    ("per_proc_batch_size=0", "per_proc_batch_size: 0 is less than 1"),
    ("cache.start=-1", "cache.start: -1 is less than 0"),
    ("class_dropout_prob=1.2", "class_dropout_prob: 1.2 is outside 0 ... 1"),
    ("mlp_ratio=inf", "mlp_ratio: inf is not a finite number"),
]


@pytest.mark.parametrize("dry", ["", "--dry-run"])
@pytest.mark.parametrize(("argv", "message"), REFUSED)
@pytest.mark.parametrize("program", [sample, sample_ddp])
def test_samplers_refuse_it_before_any_work(program, argv, message, dry, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "load", None)
    command = ["--config", tiny, f"save_video_path={tmp_path}/out", *argv.split(), *dry.split()]
    assert message in error_of(monkeypatch, program, *command)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("preview_every=5 eta=0.5", "eta: ddpm ignores eta=0.5"),
        ("preview_every=5 num_sampling_steps=1", "num_sampling_steps: the only timestep of 1 step is 0"),
        ("learning_rate=nan", "learning_rate: nan is not a finite number"),
        ("learning_rate=0", "learning_rate: 0.0 is not above 0"),
        ("ema_decay=2", "ema_decay: 2.0 is outside 0 ... 1"),
        ("max_train_steps=-1", "max_train_steps: -1 is less than 1"),
        ("local_batch_size=0", "local_batch_size: 0 is less than 1"),
        ("global_seed=-1", "global_seed: -1 is less than 0"),
        ("use_compile=True", "use_compile: there is no compiler none-such: install it, or name yours in CXX"),
        ("results_dir={file}", "results_dir: {file} is a file, where a folder is to be written"),
        ("results_dir={file}/below", "results_dir: {file} is a file, where a folder is to be written"),
    ],
)
@pytest.mark.parametrize("dry", ["", "--dry-run"])
def test_training_refuses_it_before_any_work(argv, message, dry, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "none-such")
    monkeypatch.setattr(train, "get_dataset", None)
    (tmp_path / "file").touch()
    words = argv.format(file=tmp_path / "file").split()
    if "results_dir" not in argv:
        words.append(f"results_dir={tmp_path}/out")
    assert message.format(file=tmp_path / "file") in error_of(monkeypatch, train, *words, *dry.split())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("dry", ["", "--dry-run"])
@pytest.mark.parametrize("program", [sample, sample_ddp])
def test_the_machine_and_the_output_are_checked_first(program, dry, tiny, tmp_path, monkeypatch):
    """No ffmpeg, no compiler, an output that is or lies in a file, is closed to the user, or on a full disk."""
    monkeypatch.setattr(program, "load", None)
    file = tmp_path / "file"
    file.touch()
    command = ["--config", tiny, *dry.split()]
    for place in (file, file / "below"):
        error = error_of(monkeypatch, program, *command, f"output={place}")
        assert f"save_video_path: {file} is a file, where a folder is to be written" in error
    out = f"output={tmp_path}/out"
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)
        assert "save_video_path: nothing can be written in" in error_of(monkeypatch, program, *command, out)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        assert "is full: make room, or choose another path" in error_of(monkeypatch, program, *command, out)
    with monkeypatch.context() as patch:
        patch.setenv("IMAGEIO_FFMPEG_EXE", "/none/such")
        assert "no ffmpeg to write videos: install imageio-ffmpeg" in error_of(monkeypatch, program, *command, out)
        patch.delenv("IMAGEIO_FFMPEG_EXE")
        patch.setattr(_utils, "_get_ffmpeg_exe", lambda: None)
        assert "no ffmpeg to write videos" in error_of(monkeypatch, program, *command, out)
    monkeypatch.setenv("CXX", "none-such")
    assert "use_compile: there is no compiler" in error_of(monkeypatch, program, *command, out, "--use_compile")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("program", "argv", "message"),
    [
        (fidelity, "--cache N2 eta=0.5 sample_method=ddpm", "eta: ddpm ignores eta=0.5"),
        (fidelity, "--cache N2 output={file}", "output: {file} is a file, where a folder is to be written"),
        (sweep, "steps=[1]", "num_sampling_steps: the only timestep of 1 step is 0"),
        (sweep, "guidance=[-1]", "guidance: -1.0 is outside 0 ... 100"),
        (sweep, "guidance=[nan]", "guidance: nan is not a finite number"),
        (sweep, "plans=[]", "plans: the list is empty"),
    ],
)
def test_programs_that_measure_refuse_it(program, argv, message, tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    words = argv.format(file=tmp_path / "file").split()
    assert message.format(file=tmp_path / "file") in error_of(monkeypatch, program, "--config", tiny, *words)


def test_output_of_encode_latents_is_the_folder_of_the_latents(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    error = error_of(monkeypatch, encode_latents, f"output={tmp_path}/file", "--dry-run")
    assert error.startswith(f"latents_path: {tmp_path}/file is a file, where a folder is to be written")


def test_a_judge_and_an_evaluation_look_at_their_folders_before_they_load_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "train_classifier", None)
    monkeypatch.setattr(judge, "LatentCodec", None)
    monkeypatch.setattr(evaluate, "load_output", None)
    (tmp_path / "empty").mkdir()
    for place, message in (
        ("/nowhere", "samples_path: no folder /nowhere"),
        (tmp_path / "empty", "holds no samples of"),
    ):
        assert message in error_of(monkeypatch, judge, f"samples_path={place}", f"output={tmp_path}/judge.json")
    command = ["metrics=proxy", "real_path=datasets/demo/test", "real_stride=1", f"output={tmp_path}/scores.json"]
    monkeypatch.chdir(ROOT)
    for place, message in (
        ("/nowhere", "fake_path: nothing at /nowhere"),
        (tmp_path / "empty", "fake_path: there are no"),
    ):
        assert message in error_of(monkeypatch, evaluate, *command, f"fake_path={place}")


def test_a_disk_that_fills_up_is_one_line(tmp_path):
    """A file-size limit stands in for it; the clip of before stays."""
    code = f"""
import resource, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from configs import cli
from sample.media import save_video
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
cli.run(lambda: save_video("a.mp4", torch.rand(16, 3, 128, 128), 8))
"""
    (tmp_path / "a.mp4").write_text("before")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert f"ffmpeg cannot write a video in {tmp_path}" in result.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    """A stand-in for torch waits when it is imported."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)")
    head = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a test run may ignore it
    body = (
        f"import runpy, sys; sys.argv = ['x']; runpy.run_path({str(ROOT / 'sample/sample.py')!r}, run_name='__main__')"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    program = subprocess.Popen([sys.executable, "-c", head + body], env=env, **pipes)
    assert program.stdout.readline() == "importing\n"
    program.send_signal(signal.SIGINT)
    assert (program.communicate(timeout=60)[1], program.returncode) == ("interrupted\n", 130)


@pytest.mark.parametrize("argv", ["--help", ""])
def test_head_ends_a_program_silently(argv):
    """For text that is longer than a pipe holds, and for text that is written when the program ends."""
    body = f"sys.argv = ['sample.py', {argv!r}]; parser.answer_help()" if argv else ""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from configs import cli
from sample.options import make_parser
parser = make_parser("x" * 200000)
{body}
cli.run(lambda: print("y" * 200000))
"""
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait() in (141, -signal.SIGPIPE)


def test_a_pipe_that_is_not_ours_keeps_its_traceback():
    code = "from configs import cli\ndef main(): raise BrokenPipeError('of a library')\ncli.run(main)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "BrokenPipeError: of a library" in result.stderr


READ = "--config {tree}/sample.yaml pretrained_model_path={tree} ckpt={tree}/skip.safetensors"
CLOSED = [
    ("sample.yaml", sample, READ, "{path}: Permission denied"),
    ("skip.safetensors", sample, READ, "{path}: Permission denied"),
    ("skip.pt", sample, READ.replace(".safetensors", ".pt"), "{path}: Permission denied"),
    ("vae/config.json", sample, READ, "{path}: Permission denied"),
    ("vae/diffusion_pytorch_model.safetensors", sample, READ, "{path}: Permission denied"),
    ("recipe.json", sample, f"{READ} recipe={{tree}}/recipe.json", "{path}: Permission denied"),
    ("out/sample.json", sample, READ, "save_video_path: this user may not read {path}: choose another folder"),
    ("out", sample, READ, "Permission denied"),
    (
        "clips",
        train,
        "data_path={tree}/clips dataset=video_folder",
        "{path} (Permission denied)",
    ),
    (
        "clips",
        evaluate,
        "metrics=flickering fake_path={tree}/clips",
        "{path}/sample_ddp.json: Permission denied",
    ),
]


@pytest.mark.parametrize(("closed", "program", "argv", "message"), CLOSED)
def test_what_this_user_may_not_read_is_named_in_one_line(
    closed, program, argv, message, tiny, tree, monkeypatch, capsys
):
    """As the user meets it: by exit code 2 and one line on stderr, which does not call the file damaged."""
    shutil.copytree(tiny.parent, tree, dirs_exist_ok=True)
    shutil.copy(ROOT / "pretrained/demo/recipe-43.json", tree / "recipe.json")
    torch.save({"ema": load_file(tree / "skip.safetensors")}, tree / "skip.pt")
    (tree / "clips").mkdir()
    (tree / "out/uncached").mkdir(parents=True)
    (tree / "out/uncached/000000_class0.mp4").touch()
    (tree / "out/sample.json").write_text("{}")
    subprocess.run(["chmod", "-R", "a+rwX", tree], check=True)
    output = {sample: "save_video_path={tree}/out", train: "results_dir=/tmp", evaluate: "output=/tmp/out.json"}[
        program
    ]
    argv = f"{argv} {output} --dry-run".format(tree=tree).split()
    monkeypatch.setattr(sys, "argv", [program.__file__, *argv])
    with closed_to_us(tree / closed), pytest.raises(SystemExit) as end:
        cli.run(program.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and message.format(path=tree / closed) in error, error
    assert error.count("\n") == 1 and "damaged" not in error and "valid" not in error
