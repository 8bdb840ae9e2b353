"""tools/common/cli.py: flags and key=value pairs in any order, every mistake of the user one line."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs import UserError
from configs.cli import Parser

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Options:
    cfg_scale: float = 1.0
    seed: int = 0


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
from configs import UserError
from configs import cli

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
        (["--cfg_scale=7"], "unknown flag --cfg_scale; did you mean cfg_scale=VALUE?"),
        (["--xyz"], "unknown flag --xyz; did you mean --help?"),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_a_wrong_flag_is_one_line(argv, message):
    with pytest.raises(UserError) as caught:
        parser().parse_args(argv)
    assert str(caught.value) == message


def test_help_shows_the_docstring_and_the_keys(capsys):
    with pytest.raises(SystemExit) as exit_:
        parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and "    python draw.py" in text and "cfg_scale" in text


def test_a_user_error_is_one_line_without_traceback():
    program = start_program("raise UserError('no such file; give another')")
    assert outcome(program) == (1, "error: no such file; give another\n")


def test_another_rank_names_itself():
    """An error that only rank 1 has must be seen too."""
    program = start_program("cli.PATIENCE = 0; raise UserError('bad shard')", RANK="1")
    assert outcome(program) == (1, "error: bad shard (rank 1)\n")


def test_ctrl_c_is_one_line():
    program = start_program("print('up', flush=True); time.sleep(30)")
    program.stdout.readline()
    program.send_signal(signal.SIGINT)
    assert outcome(program) == (130, "interrupted\n")


def test_our_own_mistakes_keep_their_traceback():
    code, stderr = outcome(start_program("raise ValueError('ours')"))
    assert code == 1 and "Traceback" in stderr and "ValueError: ours" in stderr
