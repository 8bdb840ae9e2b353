"""The READMEs: their commands parse and dry-run, their Python runs, their links and pictures exist.

A shell itself reads each block, with stand-ins for the programs that it calls: they write down how they were called.
Each call of a program of ours is then repeated in this process with --dry-run. It may fail only because weights, data
or the results of an earlier command are not there, never because of an unknown flag, key or value.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import configs
from models.autoencoder import LatentCodec
from models.vaes import VaeSpec

ROOT = Path(__file__).resolve().parents[1]
READMES = [
    "README.md",
    "tools/README.md",
    "train_scripts/README.md",
    "pretrained/demo/README.md",
    "pretrained/demo/vae/README.md",
]
LINKED = [*READMES, "datasets/demo/README.md", "pretrained/demo/fidelity.md"]
MISSING = re.compile(  # an error that only says which file is not there; what follows "; " is advice
    r"(?:\w+: )?(?:nothing at|no VAE in|no checkpoint|no log|no folder|no latents\.json in) (?P<path>[^\s:;]+)[:;]?.*"
)
RECORDER = """#!{python}
import json, os, sys
with open({log!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if os.path.basename(sys.argv[0]) == "srun":
    os.execvp(sys.argv[1], sys.argv[1:])
"""
TORCHRUN_FLAGS = ("standalone", "nnodes", "nproc_per_node", "rdzv_id", "rdzv_backend", "rdzv_endpoint")
PROGRAMS_CALLED = (
    "python", "python3", "torchrun", "make", "conda", "tensorboard", "srun", "scancel", "scontrol",
)  # fmt: skip


def blocks(readme: str, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language: (number of the first line, text)."""
    text = (ROOT / readme).read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in found]


SHELL = [pytest.param(text, id=f"{readme}:{line}") for readme in READMES for line, text in blocks(readme, "shell")]


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A folder to be in that looks like a fresh checkout, and takes what a command writes.

    Relative paths in YAML files start there, too: nothing depends on results and videos in the real checkout.
    """
    for path in ROOT.iterdir():
        if path.name not in (".git", "results", "sample_videos"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configs, "ROOT", tmp_path)
    return tmp_path


def calls_of(script: str, folder: Path) -> list[list[str]]:
    """The programs that a script calls, each with its arguments."""
    stand_ins, log = folder / ".stand_ins", folder / ".calls"
    stand_ins.mkdir()
    for name in PROGRAMS_CALLED:
        (stand_ins / name).write_text(RECORDER.format(python=sys.executable, log=str(log)))
        (stand_ins / name).chmod(0o755)
    env = os.environ | {"PATH": f"{stand_ins}:/usr/bin:/bin", "NPROC": "1", "SLURM_NNODES": "2", "SLURM_JOB_ID": "1"}
    result = subprocess.run(["bash", "-e"], input=script, cwd=folder, env=env, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in log.read_text().splitlines()]


def program_arguments(call: list[str]) -> list[str] | None:
    """The program of ours that a call of Python or torchrun starts, and its arguments; None for another call."""
    name, *arguments = call
    if arguments and arguments[0].endswith("sample/scripts/torchrun.py"):
        name, *arguments = "torchrun", *arguments[1:]
    if name == "torchrun":
        while arguments[0].startswith("--"):
            flag = arguments.pop(0)[2:].partition("=")[0]
            assert flag in TORCHRUN_FLAGS, f"torchrun: {flag}"
    elif name not in ("python", "python3"):
        return None
    assert arguments[0].endswith(".py"), call
    return arguments


def check_dry_run(arguments: list[str], monkeypatch, capsys) -> None:
    """Runs a program of ours with --dry-run in this process."""
    monkeypatch.setattr(sys, "argv", [*arguments, *([] if "--dry-run" in arguments else ["--dry-run"])])
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a key that does nothing
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        errors = capsys.readouterr().err.strip()
        assert stop.code == 2 and errors.startswith("error: "), errors
        for error in split_errors(errors.removeprefix("error: ")):
            match = MISSING.fullmatch(error)
            assert match and not Path(match["path"]).exists(), f"{shlex.join(arguments)}: {error}"


def split_errors(line: str) -> list[str]:
    """The errors of a line. One begins at its start, or after "; " with a key or with "no"; the rest is advice."""
    return re.split(r"; (?=\w+: nothing at |\w+: no |no VAE |no checkpoint )", line)


def check_other_call(call: list[str], folder: Path) -> None:
    """The targets and files of a call that is not ours exist."""
    name, *arguments = call
    if name == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments and set(arguments) <= set(targets), call
    elif name == "conda" and arguments[:2] == ["env", "create"]:
        assert arguments[2] == "-f" and (folder / arguments[3]).is_file(), call
    elif name == "conda":
        environment = OmegaConf.load(ROOT / "environment.yaml")
        assert arguments == ["activate", environment.name], call
    elif name == "tensorboard":
        assert arguments == ["--logdir", "results"], call


@pytest.mark.parametrize("script", SHELL)
def test_shell_blocks_run(script, checkout, monkeypatch, capsys):
    """Every command of a block has flags, keys and values that its program knows."""
    calls = calls_of(script, checkout)
    lines = script.replace("\\\n", " ").splitlines()
    assert len(calls) >= sum(bool(re.match(r"(\w+=\S+ )*(python|torchrun|bash|make|conda|srun)\b", x)) for x in lines)
    for call in calls:
        arguments = program_arguments(call)
        if arguments:
            check_dry_run(arguments, monkeypatch, capsys)
        else:
            check_other_call(call, checkout)


@pytest.mark.parametrize("readme", READMES)
def test_commands_stand_in_shell_blocks(readme):
    """An indented command, or one in a block of no language, would escape the test above."""
    text = re.sub(r"^```(?:shell|python|bibtex)\n.*?^```$", "", (ROOT / readme).read_text(), flags=re.M | re.S)
    assert not re.findall(r"^ {4}(?:python|bash|torchrun) .*", text, re.MULTILINE)
    assert "```" not in text


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["sample/sample.py", "cfg_scal=2"], "unknown key cfg_scal"),
        (["sample/sample.py", "--cash", "N2"], "unknown flag --cash"),
        (["sample/sample.py", "--config", "configs/none.yaml"], "no configuration file"),
        (["tools/evaluate.py", "metrics=fvdd", "real_path=/nowhere", "fake_path=/nowhere"], "metrics: 'fvdd'"),
        (["tools/report.py", "ckpt=/nowhere"], "unknown key ckpt"),
    ],
)
def test_a_wrong_command_fails(arguments, error, checkout, monkeypatch, capsys):
    """The check of the commands is no formality."""
    with pytest.raises(AssertionError, match=re.escape(error)):
        check_dry_run(arguments, monkeypatch, capsys)


def test_a_file_that_is_there_is_not_missing(checkout, monkeypatch, capsys):
    """An error counts as a missing file only if the file that it names does not exist."""
    (checkout / "broken").mkdir()
    with pytest.raises(AssertionError, match="no VAE in"):
        check_dry_run(["sample/sample.py", "pretrained_model_path=.", "vae=broken", "--dry-run"], monkeypatch, capsys)


@pytest.mark.parametrize("readme", [readme for readme in READMES if blocks(readme, "python")])
def test_python_blocks_run(readme, checkout, monkeypatch):
    """The Python blocks of a README, one after the other, as they stand."""
    monkeypatch.syspath_prepend(str(ROOT))
    namespace = {}
    for line, code in blocks(readme, "python"):
        exec(compile("\n" * line + code, readme, "exec"), namespace)
    if readme == "train_scripts/README.md":
        codec = LatentCodec(namespace["Squares"](), spec=VaeSpec("Squares", 48, 1, 4))
        x = torch.rand(2, 3, 3, 32, 32) * 2 - 1
        torch.testing.assert_close(codec.decode(codec.encode(x)), x)
        return
    assert (checkout / "sample_videos/cup.mp4").stat().st_size > 1000
    assert namespace["videos"].shape == (2, 16, 3, 64, 64) and namespace["video"].shape == (1, 16, 3, 64, 64)
    assert namespace["latte"].options["prediction"] == "v"


def anchors(markdown: Path) -> set[str]:
    """What GitHub calls the headings of a file."""
    headings = re.findall(r"^#+ (.*)$", markdown.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", LINKED)
def test_relative_links_lead_somewhere(readme):
    text = (ROOT / readme).read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / readme).parent / path if path else ROOT / readme
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_every_tool_is_described():
    """tools/README.md names every program of tools, and no other."""
    text = (ROOT / "tools/README.md").read_text()
    programs = {
        str(path.relative_to(ROOT / "tools"))
        for path in (ROOT / "tools").rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert set(re.findall(r"python tools/([\w/]+\.py)", text)) == programs


def test_the_citation_is_complete():
    """What CFF 1.2.0 requires, and the same paper as the README's BibTeX."""
    citation = OmegaConf.to_container(OmegaConf.load(ROOT / "CITATION.cff"))
    assert citation["cff-version"] == "1.2.0" and citation.keys() >= {"message", "title", "authors", "license"}
    assert set(citation) <= {
        "cff-version", "message", "type", "title", "abstract", "authors", "license", "keywords", "references",
    }  # fmt: skip
    (paper,) = citation["references"]
    (_, bibtex), *_ = [(0, text) for _, text in blocks("README.md", "bibtex")]
    names = " and ".join(f"{person['family-names']}, {person['given-names']}" for person in paper["authors"])
    for value in (paper["title"], names, paper["journal"], str(paper["year"])):
        assert f"={{{value}}}" in bibtex
