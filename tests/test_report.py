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
from math import log2
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import configs
from configs import SampleConfig, UserError, load_config
from sample import sample
from sample.media import save_video
from tools import report
from tools.common import documents
from tools.common.documents import markdown, readable, tree

NAME = "<evil>&\"'"  # what a class folder may be called
PLANS = ("uncached", "N2", "0,3")
FRAMES = 4
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """What sample.py --compare wrote for two clips, with videos whose frames can be told apart by their grey.

    The videos that were sampled are in the folder `sampled` beside it.
    """
    folder = tmp_path_factory.mktemp("report") / "run"
    options = ["--config", str(tiny), "--classes", "2", "0", "--compare", "--cache", *PLANS[1:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sample.py", *options, f"save_video_path={folder}"])
        sample.main()
    shutil.copytree(folder, folder.with_name("sampled"))
    record = json.loads((folder / report.SAMPLE_RECORD).read_text())
    record["clips"][1]["name"] = NAME
    (folder / report.SAMPLE_RECORD).write_text(json.dumps(record))
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


def script(page: Page) -> tuple[str, str, str]:
    """The first line, the YAML and the command of what a shell is given to sample the clips again."""
    (text,) = page.text("pre")
    start, rest = text.split("\n", 1)
    options, command = rest.split("END\n")
    return start, options, command


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
    page, record = Page(tmp_path / "page.html"), json.loads((run / report.SAMPLE_RECORD).read_text())
    cells = page.text("td")  # of the uncached row, five
    for name, row, entry in zip(PLANS[1:], (cells[5:13], cells[13:21]), record["runs"][1:], strict=True):
        assert row[0] == name and row[4:6] == [f"{entry['speedup']:.2f}", f"{entry['psnr']:.1f} dB"]
    steps = {"full": [6, 3, 2], "cached": [0, 3, 4]}
    for kind, numbers in steps.items():
        paths = [attrs["d"] for tag, attrs in page.elements if tag == "path" and attrs.get("class") == kind]
        assert [path.count("M") for path in paths] == numbers
    assert [run["plan"]["full_steps"] for run in record["runs"]] == steps["full"]
    start, options, command = script(page)
    assert start == "cat > run.yaml <<'END'"
    assert command == "python sample/sample.py --config run.yaml --compare --cache N2 0,3 --classes 2 0"
    (tmp_path / "run.yaml").write_text(options)
    assert asdict(load_config(SampleConfig, tmp_path / "run.yaml")) == record["config"]
    assert record["checkpoint"]["sha256"] in cells and record["machine"] in cells


def test_the_script_of_the_page_samples_the_same_clips(run, tmp_path, monkeypatch):
    """Bash runs it with the program's own command line; another folder is given, where the videos are compared."""
    make(monkeypatch, run, f"output={tmp_path}/page.html")
    (text,) = Page(tmp_path / "page.html").text("pre")
    (tmp_path / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" > argv\n")
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-e"], input=text, text=True, cwd=tmp_path, env=environment, check=True)
    program, *arguments = (tmp_path / "argv").read_text().splitlines()
    assert program == "sample/sample.py" and (configs.ROOT / program).is_file()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, *arguments, "save_video_path=again"])
    sample.main()
    for path in sorted(run.with_name("sampled").glob("*/0*.mp4")):
        assert Path("again", path.parent.name, path.name).read_bytes() == path.read_bytes()
    assert len(list(Path("again").glob("*/0*.mp4"))) == 6


def test_paths_inside_the_repository_start_at_its_root(run, tmp_path, monkeypatch):
    """In the options, which load as before, the checkpoint and every file; a path elsewhere stays whole."""
    record = json.loads((run / report.SAMPLE_RECORD).read_text())
    root, other = Path(record["config"]["pretrained_model_path"]), "/elsewhere" + str(tmp_path)
    for module in (configs, documents):
        monkeypatch.setattr(module, "ROOT", root)
    (tmp_path / "paths.md").write_text(f"from {root}/a.mp4, not {root}s/b or {other}{root}/c")
    (tmp_path / "paths.json").write_text(json.dumps({"file": f"{root}/a.mp4"}))
    make(monkeypatch, run, tmp_path / "paths.md", tmp_path / "paths.json", f"output={tmp_path}/page.html")
    page = Page(tmp_path / "page.html")
    _, options, _ = script(page)
    assert "ckpt: skip.safetensors\n" in options and str(root) + "/" not in options
    (tmp_path / "run.yaml").write_text(options)
    assert asdict(load_config(SampleConfig, tmp_path / "run.yaml")) == record["config"]
    assert {"skip.safetensors", "a.mp4"} <= set(page.text("td"))
    assert f"from a.mp4, not {root}s/b or {other}{root}/c" in page.text("p")


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
    assert page.text("strong") == ["N2"] and page.text("code") == ["code", "x  y\n"]
    assert page.text("li") == ["one", "two"] and ", ".join(["0"] * 20) + " and 79 more" in page.text("td")
    assert page.text("a") == ["link"] and " <evil>\nand " in page.text("p")
    html = (tmp_path / "page.html").read_text()
    assert '<th>plan</th><th class="number">dB</th>' in html and '<td class="number">48.6</td>' in html


def test_only_so_many_clips_and_a_word_when_the_page_is_large(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "LARGE", 1000)
    make(monkeypatch, run, f"output={tmp_path}/page.html", "max_clips=1")
    page = Page(tmp_path / "page.html")
    assert len(page.sources("video")) == 3 and "The first 1 of 2 clips." in "".join(page.text("figcaption"))
    assert "slowly: max_clips=1 can be lowered" in capsys.readouterr().out.splitlines()[1]


def test_a_table_may_be_a_header_alone(tmp_path):
    assert "<th>plan</th>" in markdown("| plan | dB |\n|--|--|", tmp_path)
    (tmp_path / "sweep.csv").write_text("plan,dB\n")
    assert "<th>plan</th>" in report.material(tmp_path / "sweep.csv")


def test_html_in_markdown_is_text(tmp_path):
    """Neither blocks, nor elements in a line, nor the targets of links and pictures become live."""
    lines = ["<script>alert(1)</script>", "", "a <b onclick='x()'>bold</b> word", "", "<div>", "**no**", "</div>", ""]
    lines += ["[x](javascript:alert(1)) <https://a.example> [y][z]", "", "[z]: javascript:alert(2)", ""]
    lines += ["![p](https://a.example/p.png) ![q](javascript:alert(3))", "", "```<evil>", "<i>", "```"]
    path = tmp_path / "page.html"
    path.write_text(markdown("\n".join(lines), tmp_path))
    page = Page(path)
    assert {tag for tag, _ in page.elements} <= {"p", "a", "span", "strong", "pre", "code"}
    assert all(not attrs for _, attrs in page.elements)
    text = "".join(text for _, text in page.texts)
    assert "<script>alert(1)</script>" in text and "<b onclick='x()'>bold</b>" in text and "<i>" in text
    assert page.text("a") == ["x", "https://a.example", "y"]


def test_pictures_of_markdown_come_from_beside_it(tmp_path):
    """A file inside the folder is in the page; one outside of it, one that is missing or one of the web is left out."""
    folder = tmp_path / "notes"
    (folder / "my plots").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(folder / "my plots/a.png")
    Image.new("RGB", (3, 3)).save(tmp_path / "secret.png")
    (folder / "b.txt").touch()
    sources = ["my%20plots/a.png", "../secret.png", "none.png", "b.txt", "http://a.example/a.png"]
    html = markdown("".join(f"![x]({source}) " for source in sources), folder)
    encoded = base64.b64encode((folder / "my plots/a.png").read_bytes()).decode()
    assert html.count("<img") == 1 and f'src="data:image/png;base64,{encoded}"' in html


@pytest.mark.parametrize(
    ("value", "text", "exact"),
    [
        (20029378560, "20.0 G", "20029378560"),
        ("40058757120", "40.1 G", "40058757120"),
        ("-1234567.8", "-1.23 M", "-1234567.8"),
        (999_999_999, "1.00 G", "999999999"),
        (999_999, "999999", ""),
        ("2026", "2026", ""),
        ("007", "007", ""),
        (12345678901234567890, "12345678901234567890", ""),
        ("0.5950471210001069", "0.5950", "0.5950471210001069"),
        (38.98322023664202, "38.98", "38.98322023664202"),
        ("54321.98765", "54322", "54321.98765"),
        ("0.000012345678", "1.235e-05", "0.000012345678"),
        ("1.50", "1.50", ""),
        (0.001, "0.001", ""),
        (True, "True", ""),
        (None, "", ""),
        ("4a2389fa3555306241f9", "4a2389fa3555306241f9", ""),
        ("nan", "nan", ""),
        ("2.14.1+cu130", "2.14.1+cu130", ""),
    ],
)
def test_numbers_are_readable_and_their_exact_values_are_kept(value, text, exact):
    shown = readable(value)
    assert (shown["text"], shown["exact"]) == (text, exact)


def test_tables_of_every_format_show_readable_numbers(run, tmp_path, monkeypatch):
    """The exact value is the cell's title, in a .csv, a .json, a table in Markdown and a row that is cut short."""
    (tmp_path / "a.csv").write_text("plan,macs\nN2,20029378560\nN4\n")
    (tmp_path / "b.json").write_text(json.dumps({"x": {"macs": 20029378561}, "y": {"macs": 7}}))
    (tmp_path / "c.md").write_text("| plan | macs |\n|--|--:|\n| N2 | 20029378562 |\n")
    make(monkeypatch, *(tmp_path / name for name in ("a.csv", "b.json", "c.md")), f"output={tmp_path}/page.html")
    page = Page(tmp_path / "page.html")
    assert page.text("td") == ["N2", "20.0 G", "N4", "x", "20.0 G", "y", "7", "N2", "20.0 G"]
    titles = [attrs["title"] for tag, attrs in page.elements if tag == "td" and "title" in attrs]
    assert titles == ["20029378560", "20029378561", "20029378562"]
    aligned = [attrs.get("class", attrs.get("style")) for tag, attrs in page.elements if tag == "th"]
    assert aligned == [None, "number", None, "number", None, "text-align: right;"]


def test_long_lists_of_records_say_how_many_are_left_out():
    assert tree([{"n": i} for i in range(25)])["more"] == 5
    assert len(tree([{"n": i} for i in range(25)])["rows"]) == 20


@pytest.fixture
def trained(tmp_path) -> Path:
    """A run folder of train.py: a log that a crash cut short, previews of three steps, the options."""
    folder = tmp_path / "000-Latte"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"model: Latte\ndata_path: {report.ROOT}/datasets/demo\n")
    entries = [{"step": 10 * i, "loss": 2.0**-i, "lr": 1e-3} for i in range(1, 4)]
    entries += [{"step": 20, "validation_loss": 0.75}, {"step": 40, "loss": float("nan"), "lr": 5e-4}]
    lines = [json.dumps(entry) for entry in entries]
    (folder / "log.jsonl").write_text("\n".join([*lines, '{"step": 50, "lo']))
    for step in (5, 10, 20):
        for plan, grey in (("N2", 0.5), ("uncached", -0.5)):
            video = torch.full((FRAMES, 3, 16, 32), grey)
            save_video(folder / f"previews/{step:07d}-{plan}.mp4", video, fps=8)
    return folder


def test_a_training_run_shows_its_curves_newest_previews_and_options(trained, tmp_path, monkeypatch):
    make(monkeypatch, trained, f"output={tmp_path}/page.html", "max_clips=2")
    page = Page(tmp_path / "page.html")
    curves = [attrs["d"] for tag, attrs in page.elements if tag == "path" and "curve" in attrs.get("class", "")]
    assert curves == ["M10.0 1.0L20.0 2.0L30.0 3.0h0", f"M20.0 {-log2(0.75)}h0"]
    assert page.text("span")[:6] == ["0.750", "0.306", "0.125", "10", "step", "30"]
    assert page.text("th") == ["step", "loss", "lr", "validation_loss"]
    assert page.text("td") == ["40", "nan", "0.0005", "0.75"]
    shown = [base64.b64decode(src.removeprefix("data:video/mp4;base64,")) for src in page.sources("video")]
    names = [f"{step:07d}-{plan}.mp4" for step in (20, 10) for plan in ("uncached", "N2")]
    assert shown == [(trained / "previews" / name).read_bytes() for name in names]
    assert [attrs["data-fps"] for _, attrs in page.elements if "data-fps" in attrs] == ["8"]
    assert page.text("b") == ["uncached", "N2"] and page.text("pre") == ["model: Latte\ndata_path: datasets/demo\n"]


def test_a_long_curve_is_thinned_by_means():
    entries = [{"step": step, "loss": 1.0 if step % 2 else 3.0} for step in range(1, 2 * report.MOST_POINTS + 1)]
    points = report.curve(entries, "loss")
    assert points[0] == (1.5, 1.0) and points[-1] == (2 * report.MOST_POINTS - 0.5, 1.0)  # log2 of the mean, 2
    assert len(points) == report.MOST_POINTS


def test_a_training_run_without_losses_and_previews_shows_what_there_is(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("model: Latte\n")
    make(monkeypatch, tmp_path, f"output={tmp_path}/page.html")
    page = Page(tmp_path / "page.html")
    assert page.text("pre") == ["model: Latte\n"]
    assert not {"figure", "table", "video"} & {tag for tag, _ in page.elements}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a folder, as in: "),
        (["{tmp}/none"], "nothing at .*none: give a folder that sample.py wrote"),
        (
            ["{tmp}/empty"],
            r"empty: no sample.json \(sample/sample.py writes it\), no log.jsonl \(train.py writes it\) and no ",
        ),
        (["{tmp}/strange"], "strange/log.jsonl is no record of train.py: KeyError"),
        (["{tmp}/half"], "half/sample.json is no record of sample/sample.py: UndefinedError"),
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
    for name, text in {"other": "{}", "cut": '{"config"', "lost": (run / report.SAMPLE_RECORD).read_text()}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / report.SAMPLE_RECORD).write_text(text)
    half = json.loads((run / report.SAMPLE_RECORD).read_text())
    del half["versions"]
    shutil.copytree(run, tmp_path / "half")
    (tmp_path / "half" / report.SAMPLE_RECORD).write_text(json.dumps(half))
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/log.jsonl").write_text('{"loss": 1.0}\n')
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
    assert np.abs(browser.greys("press('D'); return greys()") - expected[:, 3]).max() < 2  # shift or caps lock
    assert np.abs(browser.greys("press('D'); return greys()") - difference).max() < 2
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


@pytest.mark.parametrize("width", [1200, 400])
def test_in_a_browser_no_cell_takes_more_than_two_lines_and_only_tables_scroll(
    run, tmp_path, monkeypatch, browser, width
):
    """At the width of a screen and of a phone: long names, many columns, long texts, prose."""
    header = ["name", "machine", *(f"reference_relative_l1_margin_{i}" for i in range(12))]
    row = ["dpmsolver++-10-g2.5-uncached", "Processor (1 threads on 2 cores), " * 5, *["0.11123702011123725"] * 12]
    with (tmp_path / "sweep.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, row, row])
    records = [{"id": i, "text": "a long text " * 12, "deep": {"a": {"b": [1, 2]}, "c": "d"}} for i in range(3)]
    (tmp_path / "record.json").write_text(json.dumps({"machine": "m" * 200, "rows": records}))
    (tmp_path / "notes.md").write_text("| plan | text |\n|--|--|\n| N2 | " + "a long text " * 12 + "|\n")
    files = [tmp_path / name for name in ("sweep.csv", "record.json", "notes.md")]
    make(monkeypatch, run, *files, f"output={tmp_path}/page.html")
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.open(tmp_path / "page.html")
    cells = browser.evaluate("""
        document.querySelectorAll("main > details").forEach((details) => details.open = true);
        const rows = [...document.querySelectorAll("tr")].filter((row) => !row.querySelector(":scope > td > table"));
        return rows.flatMap((row) => [...row.cells]).map((cell) => {
            const {paddingTop, paddingBottom, lineHeight} = getComputedStyle(cell);
            return (cell.clientHeight - parseFloat(paddingTop) - parseFloat(paddingBottom)) / parseFloat(lineHeight);
        });""")  # fmt: skip
    assert len(cells) > 60 and min(cells) > 0.9 and max(cells) <= 2
    page = browser.evaluate("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert page[0] == page[1]
    scrolls = browser.evaluate("""
        return [...document.querySelectorAll("figure .scroll")].map(
            (box) => box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX === "auto");""")
    assert scrolls[-2:] == [True, True] if width == 400 else scrolls[1]  # the .csv and the table of the .md


def test_in_a_browser_previews_of_a_training_run_play_in_step(trained, tmp_path, monkeypatch, browser):
    make(monkeypatch, trained, f"output={tmp_path}/page.html")
    browser.open(tmp_path / "page.html")
    assert browser.evaluate("return document.querySelectorAll('canvas').length") == 6
    sizes = browser.evaluate(
        "return [...document.querySelectorAll('canvas')].map((c) => c.offsetWidth / c.offsetHeight)"
    )
    assert np.allclose(sizes, 2, atol=0.02)  # as the videos, 32 x 16
    assert browser.evaluate("return document.querySelector('.curves svg').getBoundingClientRect().height") > 100
    assert browser.seen("Runtime.exceptionThrown") == []
