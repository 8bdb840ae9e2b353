"""Gather videos, figures and plots into one HTML page that opens from disk and needs no network.

    python tools/report.py sample_videos/demo                  # what sample.py --compare wrote; report.html lands in it
    python tools/report.py sample_videos/demo results/sweep results/judge.json output=demo.html

Takes folders and files. A folder with sample.json becomes a grid of its clips, a column for each plan, which play in
step and can be shown as differences to uncached. The .png, .md, .csv and .json files of a folder are shown as they are.
"""

import csv
import json
import re
import shlex
import sys
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from string import Template
from textwrap import dedent
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from omegaconf import OmegaConf

from configs import ROOT, UserError, load_config, path_option, to_yaml
from tools.common import cli

RECORD = "sample.json"
SHOWN = (".png", ".md", ".csv", ".json")
MOST_LISTED = 20  # entries of a list in a .json that are shown
LARGE = 50e6  # bytes of a page that browsers open slowly
NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?\s?[\w%/]*")  # with its unit


@dataclass(kw_only=True)
class ReportConfig:
    """Options of the page."""

    title: str = "Skip-Cache, side by side"
    output: str | None = path_option()  # None: report.html in the first folder, or beside the first file
    max_clips: int = 12  # of a folder that are shown, each once for every plan


# Samples


def samples(folder: Path, max_clips: int) -> str:
    """A run of sample.py: what it did, its clips, figures, plans and record."""
    try:
        record = json.loads((folder / RECORD).read_text())
        parts = [summary(record), clips(folder, record, max_clips), figures(record), plans(record), details(record)]
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{folder / RECORD} is no record of sample/sample.py: {error!r}") from None
    return "\n".join(parts)


def summary(record: dict[str, Any]) -> str:
    """What was sampled and what came out, as a paragraph."""
    cfg, seeds = record["config"], [clip["seed"] for clip in record["clips"]]
    guidance = "" if cfg["cfg_scale"] == 1 else f", guidance {cfg['cfg_scale']:g}"
    text = f"{cfg['model']}: {len(seeds)} clips of {cfg['num_frames']} frames, seeds {seeds[0]} to {seeds[-1]}; "
    text += f"{cfg['sample_method']}, {cfg['num_sampling_steps']} steps{guidance}, {cfg['precision']}."
    against = [f"{r['plan']['name']} {r['speedup']:.2f} ×, {r['psnr']:.1f} dB" for r in record["runs"][1:]]
    if against:
        text += f" Speed-up and PSNR against uncached: {'; '.join(against)}."
    return f"<p>{escape(text)}</p>"


def clips(folder: Path, record: dict[str, Any], max_clips: int) -> str:
    """A row for each clip, a column for each plan; the script of the page makes them play in step."""
    cfg, runs, shown = record["config"], record["runs"], record["clips"][:max_clips]
    cells = ["<span></span>", *(f"<b>{escape(run['plan']['name'])}</b>" for run in runs)]
    for i, clip in enumerate(shown):
        file = f"{clip['seed']:06d}" + (f"_{clip['name']}" if clip["name"] else "") + ".mp4"
        cells.append(f"<h3>{escape(clip['name'])} <small>seed {clip['seed']}</small></h3>")
        for run in runs:
            plan = run["plan"]["name"]
            label = escape(f"{clip['name']} seed {clip['seed']}, {plan}")
            uri = data_uri(folder / plan / file, "video/mp4")
            note = f"{run['psnr_clips'][i]:.1f}&nbsp;dB &ensp;{run['ssim_clips'][i]:.3f}" if "psnr" in run else ""
            video = f'<video muted loop playsinline controls preload="none" aria-label="{label}" src="{uri}"></video>'
            cells.append(f"<div>{video}<small>{note}</small></div>")
    caption = "Each row is one seed. Space plays and pauses, ← and → step a frame"
    if len(runs) > 1:
        caption += ", D shows the difference to uncached. Below a clip: its PSNR and SSIM against uncached"
    caption += "."
    if len(shown) < len(record["clips"]):
        caption += f" The first {len(shown)} of {len(record['clips'])} clips."
    small = "small" if cfg["image_size"] <= 128 else ""
    grid = '<div class="grid">\n' + "\n".join(cells) + "\n</div>"
    attributes = f'class="clips {small}" style="--plans: {len(runs)}" data-fps="{cfg["fps"]:g}"'
    return f"<figure {attributes}>\n{grid}\n<figcaption>{caption}</figcaption>\n</figure>"


def figures(record: dict[str, Any]) -> str:
    """The table that sample.py prints."""
    header = ["plan", "full + cached", "GMACs a clip", "sampling", "speed-up", "PSNR", "SSIM", "decoding"]
    rows = []
    for run in record["runs"]:
        plan, seconds = run["plan"], run["seconds"]
        steps = f"{plan['full_steps']}\u00a0+\u00a0{plan['cached_steps']}"
        row = [plan["name"], steps, f"{plan['macs'] / 1e9:,.1f}", f"{seconds['sampling']:.1f} s"]
        row += [f"{run['speedup']:.2f}", f"{run['psnr']:.1f} dB", f"{run['ssim']:.3f}"] if "psnr" in run else [""] * 3
        rows.append([escape(cell) for cell in [*row, f"{seconds['decoding']:.1f} s"]])
    caption = f"Seconds of all {len(record['clips'])} clips on {record['machine']}."
    if len(rows) > 1:
        caption += " Speed-up: median over batches, each timed beside its uncached twin. PSNR, SSIM: means over clips."
    return figure(table(header, rows), caption)


def plans(record: dict[str, Any]) -> str:
    """Each plan as a strip of its steps."""
    cells = []
    for run in record["runs"]:
        plan = run["plan"]
        steps = plan["steps"]
        width = 0.75 if len(steps) <= 100 else 1  # gaps narrower than a pixel would flicker
        bars = {
            name: "".join(f"M{i} {top}h{width}V10h-{width}z" for i, kind in enumerate(steps) if kind == wanted)
            for name, wanted, top in (("full", "F", 0), ("cached", "c", 6))
        }
        paths = "".join(f'<path class="{name}" d="{path}"/>' for name, path in bars.items())
        count = escape(f"{plan['full_steps']} + {plan['cached_steps']}")
        strip = f'<svg viewBox="0 0 {len(steps)} 10" preserveAspectRatio="none" aria-hidden="true">{paths}</svg>'
        cells.append(f"<span>{escape(plan['name'])}</span>{strip}<small>{count}</small>")
    cells.append("<div><small>noise</small><small>clean</small></div>")
    caption = "The steps of each plan: tall ones run in full, short ones from the cache."
    return figure('<div class="plans">\n' + "\n".join(cells) + "\n</div>", caption)


def details(record: dict[str, Any]) -> str:
    """What it takes to run it again."""
    cfg, runs, checkpoint = record["config"], record["runs"], record["checkpoint"]
    labels = [clip["label"] for clip in record["clips"][:: cfg["samples_per_class"]]]
    command = ["python", "sample/sample.py", "--config", "run.yaml"]
    command += ["--compare", "--cache", *(run["plan"]["name"] for run in runs[1:])] if len(runs) > 1 else []
    command += [] if cfg["num_classes"] is None else ["--classes", *map(str, labels)]
    facts = {"checkpoint": checkpoint["path"], "sha256": checkpoint["sha256"], "machine": record["machine"]}
    return f"""<details><summary>Checkpoint, machine and options</summary>
{tree(facts | record["versions"])}
<p>With the options below in run.yaml, the same clips come from:</p>
<pre>{escape(shlex.join(command))}</pre>
<pre>{escape(OmegaConf.to_yaml(OmegaConf.create(cfg)))}</pre></details>"""


# Other material


def material(path: Path) -> str:
    """A .png, .md, .csv or .json file."""
    match path.suffix:
        case ".png":
            return figure(f'<img alt="" src="{data_uri(path, "image/png")}">', path.name)
        case ".md":
            return figure(markdown(read_text(path)), path.name)
        case ".csv":
            header, *rows = [[escape(cell) for cell in row] for row in csv.reader(StringIO(read_text(path)))] or [[]]
            return figure(table(header, rows), path.name)
        case ".json":
            try:
                value = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"{path} is not JSON: {error}") from None
            return f"<details><summary>{escape(path.name)}</summary>\n{tree(value)}</details>"


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}") from None


def markdown(text: str) -> str:
    """Headings, tables, lists, code and paragraphs, which is what our tools and READMEs hold."""
    parts = []
    for block in filter(None, re.split(r"\n\s*\n", text.strip())):
        lines = [escape(line) for line in block.splitlines()]
        if lines[0].startswith("|"):
            header, *rows = ([inline(cell.strip()) for cell in line.strip().strip("|").split("|")] for line in lines)
            parts.append(table(header, rows[1:]))  # without the ruler
        elif lines[0].startswith(("    ", "```")):
            code = "\n".join(line for line in lines if not line.startswith("```"))
            parts.append(f"<pre>{dedent(code)}</pre>")
        elif lines[0].startswith("#"):
            parts.append(f"<h3>{inline(lines[0].lstrip('# '))}</h3><p>{inline(' '.join(lines[1:]))}</p>")
        elif lines[0].startswith("- "):
            items = "\n".join(lines)[2:].split("\n- ")
            parts.append("<ul>" + "".join(f"<li>{inline(item)}</li>" for item in items) + "</ul>")
        else:
            parts.append(f"<p>{inline(' '.join(lines))}</p>")
    return "\n".join(parts)


def inline(text: str) -> str:
    """`code` and **bold** in escaped text; links become their words, and pictures nothing."""
    text = re.sub(r"!\[.*?\]\(.*?\)|\[(.*?)\]\(.*?\)", r"\1", text)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", re.sub(r"`(.+?)`", r"<code>\1</code>", text))


def tree(value: Any) -> str:
    """JSON as nested tables: alike records are rows of one, what else there is is listed entry by entry."""
    if not isinstance(value, dict | list):
        return escape("" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value))
    names = list(value) if isinstance(value, dict) else [str(i) for i in range(len(value))]
    entries = list(value.values()) if isinstance(value, dict) else value
    more = f"<p>and {len(entries) - MOST_LISTED} more</p>" if len(entries) > MOST_LISTED else ""
    names, entries = names[:MOST_LISTED], entries[:MOST_LISTED]
    if entries and all(isinstance(entry, dict) for entry in entries):
        columns = list(dict.fromkeys(key for entry in entries for key in entry))
        rows = [[escape(n), *(tree(e.get(c, "")) for c in columns)] for n, e in zip(names, entries, strict=True)]
        return table(["", *map(escape, columns)], rows) + more
    if isinstance(value, list) and not any(isinstance(entry, dict | list) for entry in entries):
        return ", ".join(map(tree, entries)) + more
    return table([], [[escape(n), tree(e)] for n, e in zip(names, entries, strict=True)]) + more


# HTML; these take text that is escaped


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns that hold only numbers are aligned to the right."""
    width = max(map(len, [header, *rows]))
    numeric = [all(NUMBER.fullmatch(row[i]) for row in rows if i < len(row) and row[i]) for i in range(width)]
    marks = [' class="number"' if number else "" for number in numeric]

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}{mark}>{c}</{tag}>" for c, mark in zip(cells, marks, strict=False)) + "</tr>\n"

    head = f"<thead>{line(header, 'th')}</thead>\n" if header else ""
    return f'<div class="scroll" tabindex="0"><table>\n{head}{"".join(line(row, "td") for row in rows)}</table></div>'


def figure(content: str, caption: str) -> str:
    return f"<figure>{content}\n<figcaption>{escape(caption)}</figcaption></figure>"


def data_uri(path: Path, kind: str) -> str:
    if not path.is_file():
        raise UserError(f"{path} is missing")
    return f"data:{kind};base64,{b64encode(path.read_bytes()).decode()}"


def section(source: Path, max_clips: int) -> str:
    """All that a folder or a file holds for the page."""
    if not source.exists():
        raise UserError(f"nothing at {source}: give a folder that sample.py wrote, or a {', '.join(SHOWN)} file")
    sampled = (source / RECORD).is_file()
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    files = [path for path in files if path.suffix in SHOWN and not (sampled and path.name in (RECORD, "compare.png"))]
    if not sampled and not files:
        raise UserError(f"{source}: no {RECORD} (sample/sample.py writes it) and no {', '.join(SHOWN)} file")
    return "\n".join(([samples(source, max_clips)] if sampled else []) + [material(path) for path in files])


def main() -> None:
    args = cli.Parser(__doc__, ReportConfig).parse_args()
    sources = [Path(text) for text in args.overrides if "=" not in text]
    cfg = load_config(ReportConfig, args.config, [text for text in args.overrides if "=" in text])
    if cfg.max_clips < 1:
        raise UserError(f"max_clips: {cfg.max_clips} is less than 1")
    if not sources:
        raise UserError("give a folder, as in: python tools/report.py sample_videos/demo")
    first = sources[0] if sources[0].is_dir() else sources[0].parent
    output = Path(cfg.output or first / "report.html")
    if args.dry_run:
        print(to_yaml(cfg) + f"# {', '.join(map(str, sources))} to {output}")
        return
    sections = [(escape(source.resolve().name), section(source, cfg.max_clips)) for source in sources]
    bodies = [f"<h2>{name}</h2>\n{body}" if len(sources) > 1 else body for name, body in sections]
    template = Template((ROOT / "tools/common/report.html").read_text(encoding="utf-8"))
    page = template.substitute(title=escape(cfg.title), body="\n".join(bodies))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    size = output.stat().st_size
    print(f"report: {output} ({size / 1e6:.1f} MB)")
    if size > LARGE:
        print(f"browsers open a page above {LARGE / 1e6:.0f} MB slowly: max_clips={cfg.max_clips} can be lowered")


if __name__ == "__main__":
    cli.run(main)
