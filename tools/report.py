"""Gather videos, tables and plots into one HTML page that opens from disk and needs no network.

    python tools/report.py sample_videos/demo                  # what sample.py --compare wrote; report.html lands in it
    python tools/report.py results/000-Latte-skip-ucf101       # a training run: its curves, previews and options
    python tools/report.py sample_videos/demo results/sweep results/judge.json output=demo.html

Takes folders and files. A folder with sample.json becomes a grid of its clips, a column for each plan, which play in
step and can be shown as differences to uncached. The .png, .md, .csv and .json files of a folder are shown as well.
"""

import csv
import json
import math
import shlex
import sys
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import av
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from omegaconf import OmegaConf

from configs import ROOT, UserError, cli, load_config, option
from configs.files import check_writable, write_text
from configs.tables import duration
from sample import SAMPLE_RECORD
from tools.common.documents import data_uri, markdown, read_text, readable, tree

LOG = "log.jsonl"  # of a training run
SHOWN = (".png", ".md", ".csv", ".json")
MOST_POINTS = 300  # of a curve
LARGE = 50e6  # bytes of a page that browsers open slowly


@dataclass(kw_only=True)
class ReportConfig:
    """The page."""

    title: str = option("Skip-Cache, side by side", "its heading")
    output: str | None = option(None, "empty: report.html in the first folder, or beside the first file", path=True)
    max_clips: int = option(12, "clips of a folder that are shown; of a training run: steps with previews", least=1)


parser = cli.Parser(__doc__, ReportConfig)


@cache
def template() -> Any:
    """The macros of the page; each returns HTML in which all text is escaped."""
    loader = FileSystemLoader(ROOT / "tools/common")
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, **options)
    environment.filters["readable"] = readable
    return environment.get_template("report.html").module


def samples(folder: Path, max_clips: int) -> str:
    """A folder of sample.py: a summary, the clips, their metrics, the plans, and a script that samples them again."""
    record = json.loads(read_text(folder / SAMPLE_RECORD))
    cfg, clips, runs = record["config"], record["clips"], record["runs"]
    plans, rows = [run["plan"]["name"] for run in runs], []
    for i, clip in enumerate(clips[:max_clips]):
        file = f"{clip['seed']:06d}" + (f"_{clip['name']}" if clip["name"] else "") + ".mp4"
        scores = [(run["psnr_clips"][i], run["ssim_clips"][i]) if "psnr" in run else () for run in runs]
        notes = [f"{score[0]:.1f}\u00a0dB \u2002{score[1]:.3f}" if score else "" for score in scores]
        rows.append((clip["name"], clip["seed"], [data_uri(folder / plan / file) for plan in plans], notes))
    command = ["python", "sample/sample.py", "--config", "run.yaml"]
    cached = [  # a recipe is in run.yaml
        run["plan"].get("text", run["plan"]["name"]) for run in runs if run["plan"]["cache"]["interval"] != 1
    ]
    command += ["--compare"] if len(plans) > 1 else []
    command += ["--cache", *cached] if cached else []
    labels = [str(clip["label"]) for clip in clips[:: cfg["samples_per_class"]]]
    command += [] if cfg["num_classes"] is None else ["--classes", *labels]
    script = f"cat > run.yaml <<'END'\n{OmegaConf.to_yaml(OmegaConf.create(cfg))}END\n{shlex.join(command)}"
    return template().samples(record, plans, rows, script)


def training(folder: Path, max_clips: int) -> str:
    """A folder with log.jsonl: its loss curves, the values logged last, the newest previews and the options."""
    entries = [json.loads(line) for line in read_text(folder / LOG).splitlines() if line.endswith("}")]  # not cut short
    curves = {key: points for key in ("loss", "validation_loss") if (points := curve(entries, key))}
    last = {key: value for entry in entries for key, value in entry.items()}
    if "hours_left" in last:
        last["time left"] = duration(3600 * last.pop("hours_left"))
    steps: dict[int, dict[str, Path]] = {}
    for path in sorted((folder / "previews").glob("*-*.mp4"), reverse=True):  # the newest first, uncached before N2
        step, _, plan = path.stem.partition("-")
        steps.setdefault(int(step), {})[plan] = path
    plans = list(next(iter(steps.values()), {}))
    complete = [(step, videos) for step, videos in steps.items() if list(videos) == plans][:max_clips]
    rows = [("", step, [data_uri(path) for path in videos.values()], [""] * len(plans)) for step, videos in complete]
    fps = frame_rate(complete[0][1][plans[0]]) if complete else 0
    options = read_text(folder / "config.yaml") if (folder / "config.yaml").is_file() else ""
    return template().training(curves, last, plans, rows, fps, options)


def curve(entries: list[dict[str, float]], key: str) -> list[tuple[float, float]]:
    """Points (step, log2 of the value), at most MOST_POINTS: each is the mean of equally many logged values."""
    points = [(entry["step"], entry[key]) for entry in entries if 0 < entry.get(key, 0) < math.inf]  # no NaN
    size = math.ceil(len(points) / MOST_POINTS) or 1
    groups = [list(zip(*points[i : i + size], strict=True)) for i in range(0, len(points), size)]
    return [(fmean(steps), math.log2(fmean(values))) for steps, values in groups]


def frame_rate(path: Path) -> float:
    with av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate)


def material(path: Path) -> str:
    """A .png, .md, .csv or .json file."""
    if path.suffix == ".png":
        return template().picture(data_uri(path), path.name)
    text = read_text(path)
    if path.suffix == ".md":
        return template().prose(markdown(text, path.parent), path.name)
    if path.suffix == ".csv":
        header, *rows = list(csv.reader(StringIO(text))) or [[]]
        return template().csv(header, rows, path.name)
    try:
        return template().json(tree(json.loads(text)), path.name)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def section(source: Path, max_clips: int) -> list[str]:
    """All that a folder or a file holds for the page, part by part."""
    if not source.exists():
        raise UserError(f"nothing at {source}: give a folder that sample.py wrote, or a {', '.join(SHOWN)} file")
    parts, skipped = [], (SAMPLE_RECORD, "compare.png") if (source / SAMPLE_RECORD).is_file() else ()
    for name, read, program in ((SAMPLE_RECORD, samples, "sample/sample.py"), (LOG, training, "train.py")):
        if (source / name).is_file():
            try:
                parts.append(read(source, max_clips))
            except UserError:
                raise
            except (AttributeError, LookupError, TypeError, ValueError, UndefinedError) as error:
                raise UserError(f"{source / name} is no record of {program}: {error!r}") from None
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    parts += [material(path) for path in files if path.suffix in SHOWN and path.name not in skipped]
    if not parts:
        wanted = f"no {SAMPLE_RECORD} (sample/sample.py writes it), no {LOG} (train.py writes it)"
        raise UserError(f"{source}: {wanted} and no {', '.join(SHOWN)} file")
    return parts


def main() -> None:
    args = parser.parse_args()
    sources = [Path(text) for text in args.overrides if "=" not in text]
    cfg = load_config(ReportConfig, args.config, [text for text in args.overrides if "=" in text])
    if not sources:
        raise UserError("give a folder, as in: python tools/report.py sample_videos/demo")
    first = sources[0] if sources[0].is_dir() else sources[0].parent
    cfg = replace(cfg, output=cfg.output or str(first / "report.html"))
    check_writable(cfg, "output")
    if args.dry_run:
        return cli.dry_run(cfg, [f"{', '.join(map(str, sources))} to {cfg.output}"])
    sections = [(source.resolve().name, section(source, cfg.max_clips)) for source in sources]
    write_text(cfg.output, template().page(cfg.title, sections))
    size = Path(cfg.output).stat().st_size
    print(f"report: {cfg.output} ({size / 1e6:.1f} MB)")
    if size > LARGE:
        print(f"browsers open a page above {LARGE / 1e6:.0f} MB slowly: max_clips={cfg.max_clips} can be lowered")


if __name__ == "__main__":
    cli.run(main)
