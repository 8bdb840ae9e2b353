"""configs/cli.py: flags and key=value pairs in any order, every mistake of the user one line."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs import UserError, option
from configs.cli import Parser, dry_run

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Options:
    """How samples are drawn."""

    cfg_scale: float = option(1.0, "guidance; 1: none", least=0, most=1000)
    seed: int = option(0, "of the first clip")
    method: str = option("ddim", "the sampler", choices=("ddpm", "ddim"))
    fast: bool = option(False, "a switch")


def parser() -> Parser:
    parser = Parser("Draw samples.\n\n    python draw.py", Options, config="configs/demo.yaml")
    parser.add_argument("--save_video_path")
    return parser


def start_program(body: str, **env: str) -> subprocess.Popen:
    """A process that runs `cli.run` on a main made of `body`."""
    code = f"""
import signal
import time

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has it ignored
from configs import UserError, cli

def main():
    {body}

cli.run(main)
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, text=True, **pipes)


def outcome(program: subprocess.Popen) -> tuple[int, str]:
    """Exit code and stderr."""
    stderr = program.communicate(timeout=60)[1]
    return program.returncode, stderr


def test_flags_and_overrides_mix():
    args = parser().parse_args(["seed=3", "--dry-run", "cache.interval=2", "--save_video_path", "out", "cfg_scale=7"])
    assert args.overrides == ["seed=3", "cache.interval=2", "cfg_scale=7"]
    assert args.dry_run and args.save_video_path == "out" and args.config == "configs/demo.yaml"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--save_vido_path", "out"], "unknown flag --save_vido_path; did you mean --save_video_path?"),
        (["--dry_run"], "unknown flag --dry_run; did you mean --dry-run?"),
        (["--guidance", "7"], "unknown flag --guidance; did you mean cfg_scale, as in cfg_scale=7?"),
        (["--seed"], "--seed: expected one value, as in --seed VALUE"),
        (["--seed", "--dry-run"], "--seed: expected one value, as in --seed VALUE"),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_a_wrong_flag_is_one_line(argv, message):
    with pytest.raises(UserError) as caught:
        parser().parse_args(argv)
    assert str(caught.value) == message


def test_every_option_is_a_flag_too_and_keeps_its_place():
    """--key VALUE, --key=VALUE and key=VALUE are the same; a switch needs no value."""
    argv = ["--seed", "3", "seed=4", "--cfg-scale=7", "--fast", "--seed", "-5", "--fast", "no", "a=b=c"]
    pairs = ["seed=3", "seed=4", "cfg_scale=7", "fast=True", "seed=-5", "fast=no", "a=b=c"]
    assert parser().parse_args(argv).overrides == pairs
    assert parser().parse_args(["save_video_path=out", "x/y=z", "seed=1"]).save_video_path == "out"
    assert parser().parse_args(["x/y=z", "seed=1"]).overrides == ["seed=1", "x/y=z"], "a path is no pair"


def test_help_shows_the_docstring_and_each_option_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as exit_:
        parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and "    python draw.py" in text
    assert re.search(r"^  cfg_scale=1.0 +guidance; 1: none \(0 ... 1000\)$", text, re.MULTILINE)
    assert re.search(r"^  method=ddim +the sampler \(ddpm \| ddim\)$", text, re.MULTILINE)
    assert text.index("How samples are drawn.") < text.index("cfg_scale=")


def test_pairs_behind_a_flag_of_several_values_are_options():
    several = parser()
    several.add_argument("--classes", nargs="+", default=[])
    several.add_argument("--model", action="append", metavar="NAME=CKPT")
    args = several.parse_args(["--classes", "Cup", "3", "seed=1", "--model", "A=a.pt"])
    assert (args.classes, args.overrides, args.model) == (["Cup", "3"], ["seed=1"], ["A=a.pt"])


def test_a_dry_run_says_what_will_run_then_the_options_then_all_that_is_missing(capsys):
    def missing(key: str):
        def check() -> None:
            raise UserError(f"{key}: nothing at /nowhere")

        return check

    with pytest.raises(UserError) as caught:
        dry_run(Options(), ["task: 3 clips"], [lambda: None, missing("ckpt"), missing("vae"), missing("ckpt")])
    assert capsys.readouterr().out.splitlines() == [
        "# task: 3 clips",
        "cfg_scale: 1.0",
        "seed: 0",
        "method: ddim",
        "fast: false",
    ]
    assert str(caught.value) == "ckpt: nothing at /nowhere; vae: nothing at /nowhere"


def test_a_user_error_is_one_line_without_traceback():
    program = start_program("raise UserError('no such file; give another')")
    assert outcome(program) == (2, "error: no such file; give another\n")


def test_another_rank_names_itself():
    """An error that only rank 1 has must be seen too."""
    program = start_program("cli.PATIENCE = 0; raise UserError('bad shard')", RANK="1")
    assert outcome(program) == (2, "error: bad shard (rank 1)\n")


def test_ctrl_c_is_one_line():
    program = start_program("print('up', flush=True); time.sleep(30)")
    program.stdout.readline()
    program.send_signal(signal.SIGINT)
    assert outcome(program) == (130, "interrupted\n")


def test_our_own_mistakes_keep_their_traceback():
    code, stderr = outcome(start_program("raise ValueError('ours')"))
    assert code == 1 and "Traceback" in stderr and "ValueError: ours" in stderr
