"""tools/common: what is written can be read again, has the right size, and appears whole or not at all."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from configs import UserError
from configs.files import write_json
from models.hardware import describe_machine
from sample import media
from sample.similarity import doubts, is_flat


def gradient(num_videos: int, frames: int, height: int, width: int) -> torch.Tensor:
    """(B, F, 3, H, W) in [-1, 1]: smooth in space and time, another one for each video."""
    b, f, y, x = (torch.linspace(-1, 1, n) for n in (num_videos, frames, height, width))
    b, f, y, x = b[:, None, None, None], f[:, None, None], y[:, None], x
    return torch.stack([x + 0 * b * f * y, (b + f) / 2 + 0 * x * y, y * f + 0 * b * x], dim=2)


def read(path: Path) -> tuple[np.ndarray, av.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0])[None, :, None].expand(3, 6, 1)
    assert media.to_uint8(values)[:, 0, 0].tolist() == [0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (37, 51), (2, 3)])
def test_mp4_holds_the_video(tmp_path, height, width):
    """H.264 in yuv420p with every frame; an odd side gains one pixel, and nothing is resized."""
    video = gradient(1, 9, height, width)[0]
    media.save_video(tmp_path / "a.mp4", video, fps=8)
    frames, stream = read(tmp_path / "a.mp4")
    assert frames.shape == (9, height + height % 2, width + width % 2, 3)
    assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)
    if height > 8:
        error = frames[:, :height, :width].astype(float) - media.to_uint8(video)
        assert np.sqrt((error**2).mean()) < 3  # of 255


def test_gif_holds_the_video(tmp_path):
    video = gradient(1, 5, 16, 20)[0]
    media.save_video(tmp_path / "a.gif", video, fps=8)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (5, (20, 16), 0)
        assert abs(gif.info["duration"] - 125) <= 5  # milliseconds; a gif counts in tens


def test_grid_puts_videos_side_by_side_in_order(tmp_path):
    """Row by row, enlarged, black where no video is left."""
    values = torch.tensor([-0.5, 0.0, 0.5])
    videos = values[:, None, None, None, None].expand(3, 4, 3, 16, 16)
    media.save_grid(tmp_path / "a.mp4", videos, fps=8, columns=2, scale=2)
    frames, _ = read(tmp_path / "a.mp4")
    assert frames.shape == (4, 64, 64, 3)
    centres = frames[0, [16, 16, 48, 48], [16, 48, 16, 48], 0]
    np.testing.assert_allclose(centres, [64, 128, 191, 0], atol=3)


def test_contact_sheet_shows_first_to_last_frame(tmp_path):
    """Rows are videos behind their label, columns evenly spaced frames."""
    values = torch.linspace(-1, 1, 9)
    videos = values[None, :, None, None, None].expand(2, 9, 3, 20, 24) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1)
    media.save_contact_sheet(tmp_path / "a.png", videos, ["up", "down"], columns=3)
    with Image.open(tmp_path / "a.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape[0] == 2 * 22
    columns = [pixels.shape[1] - 26 * k + 10 for k in (3, 2, 1)]
    assert pixels[10, columns, 0].tolist() == [0, 128, 255]
    assert pixels[32, columns, 0].tolist() == [255, 128, 0]
    assert (pixels[:, : columns[0] - 12] < 128).any()  # the labels


def test_a_failed_write_leaves_nothing(tmp_path):
    """ffmpeg refuses the frame rate: an error, the file of before as it was, and no other."""
    path = tmp_path / "a.mp4"
    path.write_text("before")
    with pytest.raises(UserError, match="ffmpeg cannot write a video in"):
        media.save_video(path, gradient(1, 2, 16, 16)[0], fps=0)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_an_unknown_suffix_lists_the_known(tmp_path):
    with pytest.raises(UserError, match=r"\.mp4 or \.gif"):
        media.save_video(tmp_path / "a.avi", gradient(1, 2, 16, 16)[0], fps=8)


def test_records(tmp_path):
    write_json(tmp_path / "folder" / "a.json", {"seconds": 1.5})
    assert json.loads((tmp_path / "folder" / "a.json").read_text()) == {"seconds": 1.5}
    machine = describe_machine(torch.device("cpu"))
    assert torch.__version__ in machine and f"{torch.get_num_threads()} threads" in machine and "\n" not in machine


@pytest.mark.parametrize("change", [0, 0.01, 1])
def test_a_clip_of_one_color_is_flat_whatever_the_color_and_the_type(change):
    """A color channel that varies by more than 2.5 levels is a picture; different channels are a color."""
    clip = torch.tensor([0.9, 0.1, -0.9]).view(3, 1, 1) + change * gradient(1, 4, 8, 8)[0].clamp(-1, 1)
    assert is_flat(clip) == is_flat(((clip.clamp(-1, 1) + 1) * 127.5).round().byte()) == (change < 1)


def test_similarity_to_clips_that_show_nothing_is_doubted():
    """A reference of one color, and cached clips equal to it, as an untrained model gives them."""
    assert doubts([False, False], [38.0, 59.0]) == []
    (flat,) = doubts([False, True], [40.0])
    assert flat.startswith("1 of 2 reference clips are nearly of one color, so metrics of their pixels say ")
    (alike,) = doubts([False], [100.0, 81.0, 40.0])
    assert alike.startswith("2 cached clips are those of the uncached run to 80 dB") and "weights=model" in alike
