"""tools/report.py: one page that holds everything, and in a browser shows the same frame of every clip."""

import base64
import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from configs import SampleConfig, UserError, load_config
from sample import sample
from sample.media import save_video
from tools import report

NAME = "<evil>&\"'"  # what a class folder may be called
PLANS = ("uncached", "N2", "N3")
FRAMES = 4
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """What sample.py --compare wrote for two clips, with videos whose frames can be told apart by their grey."""
    folder = tmp_path_factory.mktemp("report") / "run"
    options = ["--config", str(tiny), "--classes", "2", "0", "--compare", "--cache", *PLANS[1:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sample.py", *options, f"save_video_path={folder}"])
        sample.main()
    record = json.loads((folder / report.RECORD).read_text())
    record["clips"][1]["name"] = NAME
    (folder / report.RECORD).write_text(json.dumps(record))
    for i, plan in enumerate(PLANS):
        for j, name in enumerate(("000000_class2", f"000001_{NAME}")):
            grey = torch.linspace(-0.8, 0.5, FRAMES) + 0.1 * i + 0.05 * j
            save_video(folder / plan / f"{name}.mp4", grey.view(-1, 1, 1, 1).expand(-1, 3, 32, 32), fps=8)
    return folder


def videos(run: Path) -> list[Path]:
    """In the order of the page: row by row."""
    return [run / plan / f"{name}.mp4" for name in ("000000_class2", f"000001_{NAME}") for plan in PLANS]


class Page(HTMLParser):
    """The elements of a page; all but those that HTML leaves open must be closed in order."""

    OPEN = {"meta", "img", "input", "option"}

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []  # (element that holds it, text)
        self.stack: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.OPEN:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.stack[-1] if self.stack else "", data))

    def sources(self, tag: str) -> list[str]:
        return [attrs["src"] for name, attrs in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [data for name, data in self.texts if name == tag]


def make(monkeypatch, *argv: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, argv)])
    report.main()


def test_the_page_holds_every_video_and_needs_nothing_else(run, tmp_path, monkeypatch, capsys):
    make(monkeypatch, run, f"output={tmp_path}/new/page.html")
    page = Page(tmp_path / "new/page.html")
    held = [base64.b64decode(src.removeprefix("data:video/mp4;base64,")) for src in page.sources("video")]
    assert held == [path.read_bytes() for path in videos(run)]
    for _, attrs in page.elements:
        assert attrs.get("src", "data:").startswith("data:") and "href" not in attrs
    text = (tmp_path / "new/page.html").read_text()
    assert "://" not in text and "url(" not in text and "default-src 'none'" in text
    assert "compare.png" not in text and text.count("<img") == 0  # the clips are there already
    assert capsys.readouterr().out == f"report: {tmp_path}/new/page.html (0.0 MB)\n"


def test_figures_plans_and_options_are_those_of_the_record(run, tiny, tmp_path, monkeypatch):
    """The YAML in the page makes the same run again."""
    make(monkeypatch, run, f"output={tmp_path}/page.html")
    page, record = Page(tmp_path / "page.html"), json.loads((run / report.RECORD).read_text())
    cells = page.text("td")  # of the uncached row, five
    for name, row, entry in zip(PLANS[1:], (cells[5:13], cells[13:21]), record["runs"][1:], strict=True):
        assert row[0] == name and row[4:6] == [f"{entry['speedup']:.2f}", f"{entry['psnr']:.1f} dB"]
    steps = {"full": [6, 3, 2], "cached": [0, 3, 4]}
    for kind, numbers in steps.items():
        paths = [attrs["d"] for tag, attrs in page.elements if tag == "path" and attrs.get("class") == kind]
        assert [path.count("M") for path in paths] == numbers
    assert [run["plan"]["full_steps"] for run in record["runs"]] == steps["full"]
    command, options = page.text("pre")
    assert command == "python sample/sample.py --config run.yaml --compare --cache N2 N3 --classes 2 0"
    (tmp_path / "run.yaml").write_text(options)
    assert asdict(load_config(SampleConfig, tmp_path / "run.yaml")) == record["config"]
    assert record["checkpoint"]["sha256"] in cells and record["machine"] in cells


def test_other_material_is_shown_and_text_is_never_markup(run, tmp_path, monkeypatch):
    """A plot, tables in three formats, prose; each with a name or a value that would be an element."""
    folder = tmp_path / "more"
    folder.mkdir()
    Image.new("RGB", (2, 2)).save(folder / "plot <evil>.png")
    with (folder / "sweep.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["plan", "dB"], ["<evil>, N2", "48.6"]])
    (folder / "empty.csv").touch()
    lines = ["# Head <evil>", "", "| | a |", "|:--|--:|", "| **N2** | 1.5 |", "", "A [link](x.md) <evil>", "and `code`"]
    (folder / "notes.md").write_text("\n".join([*lines, "", "- one", "- two", "", "```", "x  y", "```"]))
    value = {"<evil>": [1.23456, None], "sets": {"a": {"n": 1}, "b": {"n": 2, "deep": {"k": True}}}, "long": [0] * 99}
    (tmp_path / "judge.json").write_text(json.dumps(value))
    make(monkeypatch, run, folder, tmp_path / "judge.json", f"output={tmp_path}/page.html", "title=A <evil>")
    page = Page(tmp_path / "page.html")
    assert "evil" not in {tag for tag, _ in page.elements}
    assert page.text("h1") == ["A <evil>"] and page.text("h2") == ["run", "more", "judge.json"]
    assert f"{NAME} " in page.text("h3") and "Head <evil>" in page.text("h3")
    assert f"{NAME} seed 1, N2" in [attrs.get("aria-label") for _, attrs in page.elements]
    png = base64.b64encode((folder / "plot <evil>.png").read_bytes()).decode()
    assert page.sources("img") == [f"data:image/png;base64,{png}"]
    assert {"plot <evil>.png", "sweep.csv", "notes.md"} <= set(page.text("figcaption"))
    assert {"<evil>, N2", "48.6", "1.5", "<evil>", "1.235, ", "True"} <= set(page.text("td"))
    assert page.text("strong") == ["N2"] and page.text("code") == ["code"] and page.text("li") == ["one", "two"]
    assert "A link <evil> and " in page.text("p") and "x  y" in page.text("pre") and "and 79 more" in page.text("p")
    html = (tmp_path / "page.html").read_text()
    assert '<th>plan</th><th class="number">dB</th>' in html and '<td class="number">48.6</td>' in html


def test_only_so_many_clips_and_a_word_when_the_page_is_large(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "LARGE", 1000)
    make(monkeypatch, run, f"output={tmp_path}/page.html", "max_clips=1")
    page = Page(tmp_path / "page.html")
    assert len(page.sources("video")) == 3 and "The first 1 of 2 clips." in "".join(page.text("figcaption"))
    assert "slowly: max_clips=1 can be lowered" in capsys.readouterr().out.splitlines()[1]


def test_a_table_may_be_a_header_alone():
    assert '<th class="number">plan</th>' in report.markdown("| plan | dB |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a folder, as in: "),
        (["{tmp}/none"], "nothing at .*none: give a folder that sample.py wrote"),
        (["{tmp}/empty"], r"empty: no sample.json \(sample/sample.py writes it\) and no .png, .md, .csv, .json file"),
        (["{tmp}/other"], "other/sample.json is no record of sample/sample.py: KeyError"),
        (["{tmp}/cut"], "cut/sample.json is no record of sample/sample.py: JSONDecodeError"),
        (["{tmp}/cut.json"], "cut.json is not JSON"),
        (["{tmp}/lost"], "lost/uncached/000000_class2.mp4 is missing"),
        (["{tmp}/latin.md"], "latin.md is no UTF-8 text: invalid continuation byte at byte 2"),
        (["{run}", "max_clips=0"], "max_clips: 0 is less than 1"),
        (["{run}", "max_clip=2"], "unknown key max_clip"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(run, tmp_path, monkeypatch, arguments, message):
    for name, text in {"other": "{}", "cut": '{"config"', "lost": (run / report.RECORD).read_text()}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / report.RECORD).write_text(text)
    (tmp_path / "cut.json").write_text("[1, ")
    (tmp_path / "latin.md").write_text("Fréchet", encoding="latin-1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as error:
        make(monkeypatch, *(text.format(tmp=tmp_path, run=run) for text in arguments), f"output={tmp_path}/page.html")
    assert "\n" not in str(error.value) and not (tmp_path / "page.html").exists()


# In a browser


class Browser:
    """A headless Chromium with one page, driven over its DevTools pipe."""

    FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    FLAGS += " --disable-component-update --disable-sync --remote-debugging-pipe"

    def __init__(self, profile: Path):
        (read, self.commands), (self.answers, write) = os.pipe(), os.pipe()
        shell = f'exec "$0" "$@" 3<&{read} 4>&{write}'
        flags = [*self.FLAGS.split(), f"--user-data-dir={profile}"]
        command = ["bash", "-c", shell, CHROMIUM, *flags]
        self.process = subprocess.Popen(command, pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self.buffer, self.number, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                chunk = os.read(self.answers, 1 << 16)
                assert chunk, "Chromium has gone"
                self.buffer += chunk
            answer, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(answer)
            if answer.get("id") == self.number:
                assert "result" in answer, answer
                return answer["result"]
            self.events.append(answer)

    def evaluate(self, script: str):
        """The value of an async function's body, JSON."""
        expression = f"(async () => {{ {script} }})()"
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path: Path, motion: str = "no-preference") -> None:
        """Returns when the script of the page has read all videos."""
        feature = {"name": "prefers-reduced-motion", "value": motion}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=path.as_uri())
        self.evaluate(READY)

    def before_each_page(self, script: str) -> None:
        self.call("Page.addScriptToEvaluateOnNewDocument", source=script)

    def greys(self, script: str) -> np.ndarray:
        """The mean grey of each canvas, (6,), or of N moments, (N, 6), from the sums of RGBA that a script returns."""
        return (np.array(self.evaluate(script)) / 32 / 32 - 255) / 3

    def shown_at(self, frame: int) -> np.ndarray:
        """The mean grey of each canvas when the slider is moved to a frame, (6,)."""
        seek = "const r = document.querySelector('.clips input'); r.value = %d; r.dispatchEvent(new Event('input'));"
        return self.greys(seek % frame + "return greys()")

    def seen(self, method: str) -> list[dict]:
        return [event["params"] for event in self.events if event["method"] == method]


LATE = """
const frames = new WeakMap();  // of each video, the frame shown before and how often it was asked for since
const Current = VideoFrame;
window.late = 0;
window.VideoFrame = function (video) {
  const now = new Current(video);
  const {before, asked} = frames.get(video) ?? {before: null, asked: 0};
  if (before && before.timestamp !== now.timestamp && asked < 3) {
    frames.set(video, {before, asked: asked + 1});
    window.late += 1;
    return before.clone();
  }
  frames.set(video, {before: now.clone(), asked: 0});
  return now;
};
"""
READY = """
for (let i = 0; i < 600 && !document.querySelector(".controls"); i++) await new Promise((done) => setTimeout(done, 50));
const pixels = (canvas) => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
window.greys = () => [...document.querySelectorAll("canvas")].map((c) => pixels(c).reduce((a, b) => a + b, 0));
window.press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
"""


@pytest.fixture
def browser(tmp_path):
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.call("Browser.close")
    browser.process.wait(10)


def greys(path: Path) -> np.ndarray:
    """The mean grey of each frame of a video, (F,)."""
    with av.open(str(path)) as container:
        return np.array([frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)])


def test_in_a_browser_every_clip_shows_the_same_frame(run, tmp_path, monkeypatch, browser):
    """Playing, after a seek, step by step and as a difference; without errors and without a request."""
    make(monkeypatch, run, f"output={tmp_path}/page.html")
    expected = np.stack([greys(path) for path in videos(run)])  # (6, F)
    browser.open(tmp_path / "page.html")

    moments = browser.greys("""
        const moments = [];
        for (let i = 0; i < 60; i++) { await new Promise(requestAnimationFrame); moments.push(greys()); }
        return moments;""")  # fmt: skip
    frames = np.abs(moments[:, :, None] - expected).argmin(-1)  # (60, 6)
    assert (frames == frames[:, :1]).all() and len(set(frames[:, 0])) > 1
    assert np.abs(moments - np.take_along_axis(expected, frames.T, 1).T).max() < 2

    for frame in (3, 0, 2):
        assert np.abs(browser.shown_at(frame) - expected[:, frame]).max() < 2
    for key, frame in (("ArrowRight", 3), ("ArrowRight", 0), ("ArrowLeft", 3)):
        assert np.abs(browser.greys(f"press('{key}'); return greys()") - expected[:, frame]).max() < 2
    assert browser.evaluate("return document.querySelector('output').value") == "4 / 4"
    difference = expected[:, 3].copy()
    difference[[1, 2, 4, 5]] = np.abs(difference[[1, 2, 4, 5]] - difference[[0, 0, 3, 3]])
    assert np.abs(browser.greys("press('d'); return greys()") - difference).max() < 2
    style = "return document.querySelectorAll('canvas').values().map((c) => getComputedStyle(c).filter).toArray()"
    assert browser.evaluate(style) == ["none", "brightness(8)", "brightness(8)"] * 2

    playing = "document.querySelector('.clips').classList.contains('playing')"
    assert browser.evaluate(f"const was = {playing}; press(' '); return [was, {playing}]") == [False, True]
    browser.open(tmp_path / "page.html", motion="reduce")
    assert not browser.evaluate(f"return {playing}")
    assert browser.seen("Runtime.exceptionThrown") == browser.seen("Runtime.consoleAPICalled") == []
    assert not [log for log in browser.seen("Log.entryAdded") if log["entry"]["level"] == "error"]
    urls = {sent["request"]["url"].partition(":")[0] for sent in browser.seen("Network.requestWillBeSent")}
    assert urls <= {"file", "data"}


def test_a_frame_that_a_browser_shows_late_is_waited_for(run, tmp_path, monkeypatch, browser):
    """Three times after each seek the page is given the frame before, as Chromium may do on a busy machine."""
    make(monkeypatch, run, f"output={tmp_path}/page.html")
    expected = np.stack([greys(path) for path in videos(run)])  # (6, F)
    browser.before_each_page(LATE)
    browser.open(tmp_path / "page.html")
    assert browser.evaluate("return late") == 3 * len(expected) * (FRAMES - 1)
    for frame in range(FRAMES):
        assert np.abs(browser.shown_at(frame) - expected[:, frame]).max() < 2
