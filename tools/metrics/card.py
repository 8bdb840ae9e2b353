"""What tools/evaluate.py tells of a run: caveats, card, line in a table, and the table of several runs."""

import csv
import subprocess
from pathlib import Path
from typing import Any

from configs import ROOT
from configs.files import write_text
from configs.tables import csv_table, markdown_table
from datasets.clips import summary
from models.macs import readable
from sample.similarity import UNTRAINED
from tools.metrics.options import DETECTORS, KINDS
from tools.metrics.protocols import describe_protocol, why_not
from tools.metrics.scores import NEAR

Record = dict[str, Any]  # of tools/evaluate.py


def code_version() -> str:
    """The commit of this code, with -dirty if tracked files were changed; unknown outside of a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def find_caveats(record: Record) -> list[str]:
    """The caveats that a reader of the scores must know, a line each."""
    lines, clips = [], record["fake"]["clips"]
    for metric, row in record["metrics"].items():
        few, width = min(row["fake_rows"], row.get("real_rows", row["fake_rows"])), row["width"]
        if KINDS[metric] == "inception_score" and few < row["splits"] * width:
            lines.append(f"{metric}: {few} rows in {row['splits']} splits for {width} classes; the score is too low")
        elif KINDS[metric] == "frechet" and few <= width:
            lines.append(f"{metric}: {few} rows for {width} features: a covariance is singular, the score too high")
        elif KINDS[metric] == "frechet" and clips < NEAR * width:
            lines.append(f"{metric}: {clips} clips for {width} features, fewer than {NEAR} each: the score is too high")
    protocol, settings = record["protocol"], record["protocol"]["settings"]
    if record["metrics"].keys() - {"proxy", "proxy_prdc"}:
        if protocol["departures"]:
            lines.append(f"it departs from its protocol: {describe_protocol(record)}")
        if protocol["warning"]:
            lines.append(f"{protocol['name']}: {protocol['warning']}")
    if clips < settings["num_fake"]:
        lines.append(f"{clips} fake clips, num_fake={settings['num_fake']}: compare with as many only")
    real = record["real"] or {}
    for key, found in (("real", real), ("real, all frames", real.get("all_frames", {})), ("fake", record["fake"])):
        row = {"too_short": 0, "short": [], "flat": 0, "broken": []} | found
        if row["too_short"]:
            names = f": {summary(row['short'])}" * bool(row["short"])
            lines.append(f"{key}: {row['too_short']} videos with too few frames for this stride were dropped{names}")
        if row["flat"]:
            hint = f"; {UNTRAINED}" if key == "fake" else ""
            lines.append(f"{key}: {row['flat']} of {row['clips']} clips are nearly of one color{hint}")
        if row["broken"]:
            lines.append(f"{key}: {len(row['broken'])} broken videos were passed over: {summary(row['broken'])}")
    for name, found in record["detectors"].items():
        if DETECTORS[name].is_file and not found["published"]:
            word = "no public SHA-256 is known" if found["published"] is None else "not the published file"
            lines.append(f"{name}: {word}; the SHA-256 of {found['path']} is {found['sha256']}")
    return lines


def card(record: Record, picture: str | None = None) -> str:
    """The card in Markdown: scores, and all that another run must share with this one for its scores to compare.

    Args:
        picture: the name of the contact sheet beside the card.
    """
    lines = [f"protocol: {describe_protocol(record)} ({record['protocol']['source']})"]
    if real := record["real"]:
        used = f"{real['clips']} clips" if "clips" in real else "all frames"
        lines.append(f"real: {used} of {real['videos']} videos in {real['path']}")
        if "all_frames" in real:
            lines.append(f"real, for fid: {real['all_frames']['frames']} frames of all videos")
    fake, run = record["fake"], record["fake"].get("generate")
    if fake["kind"] == "samples in memory":
        origin = f"{record['protocol']['settings']['num_fake']} samples from seed {run['seed']} on"
    else:
        origin = f"{fake['videos']} videos in {fake['path']}"
    lines.append(f"fake: {fake['clips']} of {origin}, {fake['kind']}")
    if run:
        steps = f"{run['sample_method']}, {run['num_sampling_steps']} steps, guidance {run['cfg_scale']:g}"
        lines.append(f"sampler: {steps}, plan {fake['plan']['name']}, {readable(fake['plan']['macs'])} a clip")
        lines.append(f"checkpoint: {fake['checkpoint']['path']}, SHA-256 of its weights {weights_of(fake)}")
    if record["seconds"]:
        lines.append(f"cost: {record['seconds']:.2f} s a clip, sampled and decoded, on {record['machine']}")
    settings = ", ".join(f"{name}={value}" for name, value in record["protocol"]["settings"].items())
    lines += [f"settings: {settings}, seed={record['config']['seed']}", f"code: {record['code']}, {record['date']}"]
    lines += [f"{name}: SHA-256 {found['sha256']}" for name, found in record["detectors"].items() if found["sha256"]]
    lines += [f"warning: {line}" for line in record["warnings"]]
    table = markdown_table([score_cells(metric, row) for metric, row in record["metrics"].items()])
    text = f"{table}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"
    return text + (f"\n![the first clips, 8 frames of each]({picture})\n" if picture else "")


def score_cells(metric: str, row: Record) -> dict[str, str]:
    """A metric's row in the table of a card."""
    details = [f"{key} {row[key]:.3f}" for key in ("precision", "recall", "density", "coverage") if key in row]
    details += [f"± {row['std']:.4f}"] if "std" in row else []
    details += [f"{row['splits']} splits"] if "splits" in row else []
    cells = {"metric": metric, "value": f"{row['value']:.4f}"}
    for title, key in (("95 %", "interval"), ("95 % of it", "infinite_interval")):
        if title == "95 % of it" and "infinite" in row:
            cells["infinitely many fakes"] = f"{row['infinite']:.4f}"
        cells[title] = "{:.4f} ... {:.4f}".format(*row[key]) if key in row else ""
    return cells | {"details": ", ".join(details)}


def csv_line(name: str, record: Record) -> dict[str, Any]:
    """A record as a line of the table of all runs."""
    fake = record["fake"]
    line = {"name": name, "date": record["date"], "protocol": describe_protocol(record), "code": record["code"]}
    line |= {"fakes": fake.get("path") or fake["checkpoint"]["path"], "fake_clips": fake["clips"]}
    line |= {"weights": weights_of(fake), "plan": fake.get("plan", {}).get("name")}
    for metric, row in record["metrics"].items():
        line[metric] = row["value"]
        line |= dict(zip((f"{metric}_low", f"{metric}_high"), row.get("interval", ()), strict=False))
    macs = fake.get("plan", {}).get("macs")
    return line | {"macs": macs, "seconds": record["seconds"], "machine": record["machine"]}


def weights_of(fake: Record) -> str | None:
    """The hash of the weights behind the fakes; of their file where a folder's record has no other; None: unknown."""
    checkpoint = fake.get("checkpoint", {})
    return checkpoint.get("weights") or checkpoint.get("sha256")


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Adds a line to a CSV file; columns that it lacks are added."""
    lines = []
    if path.is_file():
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
    write_text(path, csv_table([*lines, line]))


def comparison(records: dict[str, Record]) -> str:
    """A Markdown table of several records by name, and why the scores of some do not compare with the first's."""
    first, rows, reasons = next(iter(records.values())), [], []
    metrics = dict.fromkeys(metric for record in records.values() for metric in record["metrics"])
    for name, record in records.items():
        reason = why_not(record, first)
        row = {"run": name + " *" * bool(reason), "protocol": record["protocol"]["name"]}
        row["plan"] = record["fake"].get("plan", {}).get("name", "")
        for metric in metrics:
            found = record["metrics"].get(metric)
            row[metric] = f"{found['value']:.4g}" if found else ""
            if found and "interval" in found:
                row[metric] += " ({:.4g} ... {:.4g})".format(*found["interval"])
        macs = record["fake"].get("plan", {}).get("macs")
        row |= {"MACs a clip": readable(macs).removesuffix("MACs") if macs else ""}
        row |= {"seconds a clip": f"{record['seconds']:.2f}" if record["seconds"] else ""}
        rows.append(row)
        reasons += [f"- {name} does not compare with {next(iter(records))}: {reason}"] * bool(reason)
    notes = "Intervals are of each score alone. Runs of the same seeds pair: compare them with tools/fidelity.py."
    return "\n".join([markdown_table(rows), "", *(f"{each}" for each in reasons), f"- {notes}"])
