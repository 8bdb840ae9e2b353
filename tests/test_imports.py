"""The architecture: imports point down only, programs are thin, and each mechanism exists once."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"configs", "models", "diffusion", "datasets", "sample", "tools", "train", "pretrained"}
LIBRARIES = ("configs", "models", "diffusion", "datasets")
MAY_IMPORT = {  # package -> ours that it may import, beside itself
    "configs": set(),
    "models": {"configs"},
    "diffusion": {"configs"},
    "datasets": {"configs"},
    "sample": set(LIBRARIES),
    "tools": {*LIBRARIES, "sample"},
    "pretrained": {"configs", "models"},
    "train.py": {*LIBRARIES, "sample", "tools"},
}
PROGRAMS = sorted(
    path
    for path in (*ROOT.glob("*.py"), *(p for d in ("sample", "tools", "pretrained") for p in (ROOT / d).rglob("*.py")))
    if '__name__ == "__main__"' in path.read_text()
)
ONCE = {  # a mechanism -> how its code shows, and the one file that holds it
    "choosing a backend of matplotlib": (r"matplotlib\.use\(", "tools/common/plots.py"),
    "padding a Markdown table": (r"\.ljust\(", "configs/tables.py"),
    "writing JSON records": (r"json\.dumps\(.*indent", "configs/files.py"),
    "hashing files": (r"file_digest\((?!stream)", "configs/files.py"),
    "facts about the processor": (r"/proc/cpuinfo", "models/hardware.py"),
    "timing on a device": (r"cuda\.synchronize", "models/hardware.py"),
    "making a diffusion from options": (r"\.noise_schedule, ", "diffusion/__init__.py"),
    "comparing settings": (r"\{before\.get\(key\)\}, not", "configs/files.py"),
    "locking a file": (r"fcntl\.lockf", "configs/files.py"),
    "reading the environment of torchrun": (r'environ.*"(RANK|WORLD_SIZE)"', "configs/cli.py"),
    "a plan from options": (r"interval_plan\((?!timesteps: )", "sample/plans.py"),
}


def sources() -> list[Path]:
    """Our Python files but the tests."""
    return [path for name in OURS for path in ([ROOT / "train.py"] if name == "train" else (ROOT / name).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it: `models.latte`, `sample.sample`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] in OURS}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_arrows_point_down(package):
    files = [ROOT / package] if package.endswith(".py") else sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        surplus = {name.split(".")[0] for name in imports(path)} - MAY_IMPORT[package] - {package}
        assert not surplus, f"{path.relative_to(ROOT)} imports {', '.join(surplus)}"


def test_no_program_is_imported():
    """A library that lives inside a program cannot be found, and drags the program's imports along."""
    names = {module_name(path) for path in PROGRAMS}
    assert {"train", "sample.sample", "tools.evaluate"} <= names
    for path in sources():
        found = imports(path) & names - {module_name(path)}
        assert not found, f"{path.relative_to(ROOT)} imports {', '.join(found)}"


@pytest.mark.parametrize("mechanism", ONCE)
def test_a_mechanism_exists_once(mechanism):
    pattern, home = ONCE[mechanism]
    found = {str(path.relative_to(ROOT)) for path in sources() if re.search(pattern, path.read_text())}
    assert found == {home}, mechanism


def test_programs_put_this_repo_first():
    """Programs run from any folder, also where another package is called `datasets`: our root leads sys.path."""
    assert len(PROGRAMS) >= 5
    for path in PROGRAMS:
        text = path.read_text()
        insert = text.find("sys.path.insert(0, str(Path(__file__).resolve().parent")
        ours = re.search(rf"^(from|import) ({'|'.join(OURS)})\b", text, re.MULTILINE)
        assert ours and 0 < insert < ours.start(), f"{path} imports ours before it inserts our root"


@pytest.mark.parametrize("path", PROGRAMS, ids=module_name)
def test_help_needs_no_torch(path, tmp_path):
    """--help answers at once: a `torch` that cannot be imported stands in the way of whoever tries."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported for --help')")
    command = [sys.executable, str(path), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ") and not result.stderr


def test_importing_a_library_is_light():
    """Nothing is read, drawn, started or set, and what few users need stays unloaded until it is used."""
    code = f"""
import sys, threading
import torch
before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), threading.active_count()
import {", ".join(LIBRARIES)}
import models.autoencoder, sample.pipeline
after = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), threading.active_count()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
heavy = {{"diffusers", "accelerate", "transformers", "matplotlib", "torchmetrics"}}
print(sorted(heavy & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")
