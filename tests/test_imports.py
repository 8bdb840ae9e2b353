"""The architecture: imports point down only, and importing a package does nothing heavy."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("configs", "models", "diffusion", "datasets")
MAY_IMPORT = {  # package -> ours that it may import, beside itself
    "configs": set(),
    "models": {"configs"},
    "diffusion": {"configs"},
    "datasets": {"configs"},
    "sample/pipeline.py": set(LIBRARIES),
    "tools/common": {*LIBRARIES, "tools.common"},
}
OURS = {"configs", "models", "diffusion", "datasets", "sample", "tools", "train", "pretrained"}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it: `models`, or `tools.common` for what lies in tools."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names if name.split(".")[0] in OURS]
    return {".".join(name[:2]) if name[0] in ("tools", "sample") else name[0] for name in parts}


def files(package: str) -> list[Path]:
    return [ROOT / package] if package.endswith(".py") else sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_arrows_point_down(package):
    assert files(package)
    for path in files(package):
        surplus = imports(path) - MAY_IMPORT[package] - {package}
        assert not surplus, f"{path.relative_to(ROOT)} imports {', '.join(surplus)}"


def test_programs_put_this_repo_first():
    """Programs run from any folder, also where another package is called `datasets`: our root leads sys.path."""
    programs = [path for folder in ("", "sample", "tools", "pretrained") for path in (ROOT / folder).glob("*.py")]
    programs = [path for path in programs if "__main__" in path.read_text()]
    assert len(programs) >= 5
    for path in programs:
        text = path.read_text()
        insert = text.find("sys.path.insert(0, str(Path(__file__).resolve().parent")
        ours = re.search(rf"^(from|import) ({'|'.join(OURS)})\b", text, re.MULTILINE)
        assert ours and 0 < insert < ours.start(), f"{path} imports ours before it inserts our root"


def test_importing_a_library_is_light():
    """Nothing is read, drawn, started or set, and what few users need stays unloaded until it is used."""
    code = f"""
import sys, threading
import torch
before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), threading.active_count()
import {", ".join(LIBRARIES)}
after = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), threading.active_count()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
heavy = {{"diffusers", "accelerate", "transformers", "matplotlib", "torchmetrics"}}
print(sorted(heavy & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")
