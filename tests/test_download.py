"""pretrained/download_ckpts.py against a hub on this machine that speaks as much of the protocol as is used."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "pretrained" / "download_ckpts.py"
FILES = {
    "/GuanjieChen/Skip-DiT/resolve/main/taichi-skip.pt": b"taichi" * 1000,
    "/GuanjieChen/Skip-DiT/resolve/main/skytimelapse-skip.pt": bytes(range(256)) * 2**16,  # 16 MB
    "/GuanjieChen/Skip-DiT/resolve/main/ucf101-skip.pt": b"not 2.77 GB",
    "/maxin-cn/Latte/resolve/main/vae/config.json": b'{"scaling_factor": 0.18215}',
    "/maxin-cn/Latte/resolve/main/vae/diffusion_pytorch_model.bin": b"vae" * 1000,
}
WHOLE = ["Latte/vae/config.json", "Latte/vae/diffusion_pytorch_model.bin", "taichi-skip/taichi-skip.pt"]


class Hub(ThreadingHTTPServer):
    """Serves FILES; `gets` records (path, first byte); `stalling` answers stop before the end."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.gets: list[tuple[str, int]] = []
        self.stalling = False

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(first=0)

    def do_GET(self) -> None:
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.server.gets.append((self.path, first))
        content = self.answer(first)
        self.wfile.write(content[:-1] if self.server.stalling else content)
        while self.server.stalling:
            time.sleep(0.05)

    def answer(self, first: int) -> bytes:
        content = FILES.get(self.path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return b""
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        return content[first:]

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()


def start_download(folder: Path, endpoint: str, *flags: str) -> subprocess.Popen:
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, str(PROGRAM), "--dir", str(folder), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, cwd=folder, **pipes)


def download(folder: Path, endpoint: str, *flags: str) -> subprocess.CompletedProcess:
    program = start_download(folder, endpoint, *flags)
    stdout, stderr = program.communicate(timeout=60)
    return subprocess.CompletedProcess(program.args, program.returncode, stdout, stderr)


def test_files_arrive_where_the_configs_expect_them_and_are_not_fetched_twice(tmp_path, hub):
    """Exactly the named files; a second run skips what is whole, and mends what is not."""
    result = download(tmp_path, hub.endpoint, "--only", "taichi", "vae")
    assert result.returncode == 0, result.stderr
    contents = [(tmp_path / name).read_bytes() for name in WHOLE]
    assert contents == [b'{"scaling_factor": 0.18215}', b"vae" * 1000, b"taichi" * 1000]
    assert len(hub.gets) == 3

    (tmp_path / WHOLE[2]).write_bytes(b"cut")
    assert download(tmp_path, hub.endpoint, "--only", "taichi", "vae").returncode == 0
    assert (tmp_path / WHOLE[2]).read_bytes() == b"taichi" * 1000 and len(hub.gets) == 4


def test_a_killed_download_continues(tmp_path, hub):
    """The hub's client writes 10 MB at a time; kill -9 after the first: the next run asks for the rest only."""
    path = "/GuanjieChen/Skip-DiT/resolve/main/skytimelapse-skip.pt"
    hub.stalling = True
    program = start_download(tmp_path, hub.endpoint, "--only", "skytimelapse")
    deadline = time.monotonic() + 30
    while sum(part.stat().st_size for part in tmp_path.glob("*/*.part")) < 10 * 2**20:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    program.kill()
    program.communicate()
    hub.stalling = False

    assert download(tmp_path, hub.endpoint, "--only", "skytimelapse").returncode == 0
    assert (tmp_path / "skytimelapse-skip/skytimelapse-skip.pt").read_bytes() == FILES[path]
    assert hub.gets == [(path, 0), (path, 10 * 2**20)]
    assert [file.name for file in (tmp_path / "skytimelapse-skip").iterdir()] == ["skytimelapse-skip.pt"]


def test_a_damaged_download_is_not_kept(tmp_path, hub):
    path = "/GuanjieChen/Skip-DiT/resolve/main/taichi-skip.pt"
    etag = hashlib.sha256(FILES[path]).hexdigest()
    (tmp_path / "taichi-skip").mkdir()
    (tmp_path / "taichi-skip" / f"taichi-skip.pt.{etag[:8]}.part").write_bytes(b"?" * 2500)
    result = download(tmp_path, hub.endpoint, "--only", "taichi")
    assert result.returncode == 2 and "damaged" in result.stderr and not list((tmp_path / "taichi-skip").iterdir())


def test_another_file_under_the_name_of_a_checkpoint(tmp_path, hub):
    """A mirror that serves something else: nothing is fetched."""
    result = download(tmp_path, hub.endpoint, "--only", "ucf101")
    assert result.returncode == 2 and "11 bytes instead of 2,771,053,040" in result.stderr and not hub.gets


def test_offline_names_urls_targets_and_the_mirror(tmp_path):
    """Nothing listens there: a line for each file to copy by hand, then the error."""
    result = download(tmp_path, "http://127.0.0.1:9")
    *log, error = result.stderr.splitlines()
    files = [line for line in log if " -> " in line]  # older clients log their retries too
    assert result.returncode == 2 and len(files) == 6
    assert files[0].endswith(f"ucf101-skip.pt -> {tmp_path}/ucf101-skip/ucf101-skip.pt")
    assert files[-1].endswith(f"/vae/diffusion_pytorch_model.bin -> {tmp_path}/Latte/vae/diffusion_pytorch_model.bin")
    assert error.startswith("error: the hub is out of reach") and "HF_ENDPOINT" in error


def test_a_file_that_the_hub_lacks(tmp_path, hub):
    result = download(tmp_path, hub.endpoint, "--only", "ffs")
    assert result.returncode == 2 and "404" in result.stderr and "Traceback" not in result.stderr


def test_dry_run_lists_without_network(tmp_path):
    result = download(tmp_path, "http://127.0.0.1:9", "--dry-run", "--only", "latte")
    targets = [Path(line.partition(" -> ")[2]).relative_to(tmp_path) for line in result.stdout.splitlines()]
    assert result.returncode == 0 and not list(tmp_path.iterdir())
    assert [str(target) for target in targets] == [
        "Latte/ucf101.pt", "Latte/taichi-hd.pt", "Latte/skytimelapse.pt", "Latte/ffs.pt"
    ]  # fmt: skip


def test_an_unknown_name_lists_the_valid_ones(tmp_path):
    result = download(tmp_path, "http://127.0.0.1:9", "--only", "sky")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "'skytimelapse'" in result.stderr


def test_help_lists_the_names_without_torch(tmp_path):
    """A torch that cannot be imported does no harm."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, str(PROGRAM), "--help"], env=env, capture_output=True, text=True)
    assert result.returncode == 0 and "skytimelapse" in result.stdout
