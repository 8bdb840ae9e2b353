"""tools/proxy_response.py: the same table each time, in which faults show where they should."""

import sys
from pathlib import Path

import pytest
import torch

from configs import UserError
from sample.media import save_video
from tests.test_evaluate import clip
from tests.test_fidelity import read_markdown
from tools import proxy_response


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The program on the clips in tmp_path -> what it prints."""

    def run() -> str:
        argv = [f"real_path={tmp_path}", "num_frames=4", "image_size=32", "batch_size=3"]
        monkeypatch.setattr(sys, "argv", ["proxy_response.py", *argv])
        proxy_response.main()
        return capsys.readouterr().out

    return run


def save(folder: Path, count: int) -> None:
    for number in range(count):
        save_video(folder / f"{number}.mp4", clip(number, 6), fps=8)


def test_the_table_repeats_and_shows_faults(run, tmp_path):
    """Blur and noise in texture, disorder and stills in motion alone; a broken video is passed over."""
    save(tmp_path, 6)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    text = run()
    assert text == run()
    floor, blurred, noisy, shuffled, repeated = (list(line.values()) for line in read_markdown(text))
    texture, motion = float(floor[2]), float(floor[3])
    for line in (blurred, noisy):
        weak, _, strong = (float(x) for x in line[2].split(" / "))
        assert strong > max(weak, texture)
    assert float(repeated[3].split(" / ")[2]) > motion
    # Sums over time in another order are rounded otherwise, and so may be the last of the three digits shown.
    assert [float(x) for x in shuffled[2].split(" / ")] == pytest.approx([texture] * 3, rel=5e-3)
    assert shuffled[3] != " / ".join([floor[3]] * 3)


def test_faults_are_what_the_table_says():
    x = torch.arange(16.0).view(1, 16, 1, 1, 1).expand(2, 16, 3, 4, 4)
    assert proxy_response.repeat(x, 4)[0, :, 0, 0, 0].tolist() == [0] * 4 + [4] * 4 + [8] * 4 + [12] * 4
    shuffled = proxy_response.shuffle(x, 4)[:, :, 0, 0, 0]
    assert not torch.equal(shuffled[0], shuffled[1])
    assert torch.equal(shuffled.unflatten(1, (4, 4)).sort(2).values.flatten(1), x[:, :, 0, 0, 0])
    assert (proxy_response.noise(x, 5) - x).std().item() == pytest.approx(5 / 127.5, rel=0.05)


def test_too_few_clips_are_one_line(run, tmp_path):
    save(tmp_path, 3)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"real_path: 3 of 4 videos can be used, 4 are needed: .*broken.mp4: does not"):
        run()
