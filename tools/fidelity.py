"""How far cached clips are from their uncached twins, beside clips of fewer steps at the same cost.

    python tools/fidelity.py --cache N2 N3 N4 N5 N6 num_clips=70 seed=10000       # the demo
    python tools/fidelity.py --cache N2 N4 sample_method=ddpm num_sampling_steps=250 controls=False
    python tools/fidelity.py --config configs/ucf101/ucf101_sample_skip.yaml --cache N2 num_clips=202
    torchrun --standalone --nproc_per_node=8 tools/fidelity.py --config ... --cache N2 N3     # shares out the seeds

A clip's twin has its seed and label and is sampled uncached. Against it, clip by clip (tools/common/fidelity.py says
how): relative L1 of the latents, PSNR, SSIM, LPIPS if its weights are on the disk, and flicker, the error of frame
differences. Each plan has a control: the uncached sampler with as many steps as cost the plan's MACs, rounded.

A solver that draws no noise on its way (ddim with eta=0, dpmsolver++, unipc) leads a seed to nearly the same clip in
fewer steps, so controls pair with the twins. One that draws at every step (ddpm) draws other noise in fewer steps:
its controls do not pair and have no figures against the twins. They compare with the plans by proxy distances
(Fréchet distance of tools/common/features.py, no FVD) of sets that share no noise: to the uncached clips of the other
half of the seeds, where the row "uncached" shows how far equals are, and to the real clips in real_path.

Writes to `output`: fidelity.md, fidelity.json with the figures of each clip, and as it goes clips/ (a line for each
batch sampled, and the twins' latents). The same command again does only what is missing; so do other plans, steps,
guidance or seeds in the same folder, also those of tools/sweep.py. Other settings need another folder.
Letters: N clips, B batch, F frames, C channels of the latents, D proxy features.
"""

import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from configs import (
    CACHE_FORM,
    ROOT,
    CacheOptions,
    SampleConfig,
    UserError,
    choice,
    load_config,
    parse_cache,
    path_option,
)
from datasets import class_names
from datasets.clips import summary
from models.checkpoint import atomic_path
from sample import sample_ddp
from sample.options import Plan, describe, dry_run, make_plan, make_record, parse, plan_line, plan_name
from sample.pipeline import load, make_diffusion, resolve, sample_latents
from sample.sample import timed
from sample.sample_ddp import labels_of
from tools.common import cli
from tools.common.detectors import find_detector, load_output
from tools.common.distributed import Environment, distributed
from tools.common.features import load_proxy
from tools.common.fidelity import METRICS, aggregate, compare, distance_to_others, load_lpips, lpips_weights
from tools.common.frechet import distance_spread, frechet_distance
from tools.common.macs import readable
from tools.common.records import check_place, describe_machine, write_json
from tools.evaluate import EvaluateConfig, Features, Files, extract

UNCACHED = "uncached"
FEWEST_CLIPS = 4  # two in each half
BOOTSTRAP = 200  # draws behind the interval of a distance to real clips


@dataclass(kw_only=True)
class MeasureConfig(SampleConfig):
    """Options of sampling and of measuring."""

    num_clips: int = 64  # seeds seed, seed + 1, ...
    real_path: str | None = path_option()  # video files; None: no distance to real clips
    real_stride: int = 1  # frames from one to the next of a real clip, as in training
    output: str = path_option("results/fidelity")


@dataclass(kw_only=True)
class FidelityConfig(MeasureConfig):
    """Options of this program."""

    controls: bool = True  # also the uncached sampler with as few steps as cost a plan's MACs


@dataclass(frozen=True)
class Cell:
    """One way to sample."""

    method: str
    steps: int
    guidance: float
    plan: str = UNCACHED  # or a name that plan_name gives

    @property
    def name(self) -> str:
        return f"{self.method}-{self.steps}-g{self.guidance:g}-{self.plan}"

    @property
    def cache(self) -> CacheOptions:
        return CacheOptions(interval=1) if self.plan == UNCACHED else parse_cache(self.plan)

    def options(self, cfg: MeasureConfig) -> MeasureConfig:
        """`cfg` to sample this way."""
        way = dict(sample_method=self.method, num_sampling_steps=self.steps, cfg_scale=self.guidance)
        return replace(cfg, **way, cache=self.cache)

    def draws_noise(self, eta: float) -> bool:
        """At every step, not only the first."""
        return self.method == "ddpm" or (self.method == "ddim" and eta > 0)


class Task(NamedTuple):
    """A cell, and those it is held against, whose own tasks come first."""

    cell: Cell
    twin: Cell  # uncached; also the measure of speed
    reference: Cell | None = None

    def pairs(self, eta: float) -> dict[str, Cell]:
        """Which others have clips that pair with the cell's: the same noise at the same steps, or only at first."""

        def pair(other: Cell) -> bool:
            same_steps = replace(other, plan=self.cell.plan) == self.cell
            return same_steps or not (self.cell.draws_noise(eta) or other.draws_noise(eta))

        others = {"twin": self.twin, "reference": self.reference}
        return {role: other for role, other in others.items() if other not in (None, self.cell) and pair(other)}


@dataclass
class Measured:
    """What the lines say of a cell."""

    seconds: dict[tuple[str, tuple[int, ...]], float] = field(default_factory=dict)  # of a batch, by machine and seeds
    features: dict[int, list[float]] = field(default_factory=dict)  # (D,) by seed
    pairs: dict[str, dict[int, dict[str, float]]] = field(default_factory=lambda: defaultdict(dict))  # other, seed


def main() -> None:
    parser = cli.Parser(__doc__, FidelityConfig, config=str(ROOT / "configs/demo/demo_sample.yaml"))
    parser.add_argument("--cache", nargs="+", default=[], metavar="PLAN", help=f"{CACHE_FORM}, as N2-900-50")
    args = parse(parser)
    with distributed(timeout=timedelta(days=1)) as env:  # the last process may finish long after the first
        cfg = resolve(load_config(FidelityConfig, args.config, args.overrides), env.device)
        twin = Cell(cfg.sample_method, cfg.num_sampling_steps, cfg.cfg_scale)
        caches = [parse_cache(text) for text in args.cache] or [cfg.cache]
        cells = [replace(twin, plan=plan_name(cache)) for cache in caches]
        if twin in cells:
            raise UserError("uncached clips are their own twins: give plans with cached steps, as in --cache N2 N4")
        plan_of = planner(cfg, env.device)
        runs = {UNCACHED: twin}  # what the table calls it -> cell
        for cell in cells:
            runs[cell.plan] = cell
            control = replace(twin, steps=round(twin.steps * plan_of(cell).share))
            if cfg.controls and control not in runs.values():  # plans that cost the same share one
                runs[f"control of {cell.plan}"] = control
        tasks = [Task(cell, twin) for cell in dict.fromkeys(runs.values())]
        rows, real = run(cfg, tasks, plan_of, args.dry_run, env)
    if rows:
        rows = [{"run": name, **rows[cell]} for name, cell in runs.items()]
        table = markdown([{"run": row["run"], **columns(row)} for row in rows])
        text = f"{table}\n\n{notes(cfg, tasks, rows, real)}"
        by_class = [by_class_table(rows, metric) for metric in METRICS if cfg.num_classes and metric in rows[1]["twin"]]
        write_text(Path(cfg.output, "fidelity.md"), "\n\n".join([text, *by_class]) + "\n")
        write_record(Path(cfg.output, "fidelity.json"), cfg, rows, real, env)
        print(f"\n{text}\n\nrecord: {cfg.output}")


# ---------------------------------------------------------------------------------------------------------------------
# Measuring, shared with tools/sweep.py
# ---------------------------------------------------------------------------------------------------------------------


def run(
    cfg: MeasureConfig, tasks: list[Task], plan_of: Callable[[Cell], Plan], dry: bool, env: Environment
) -> tuple[dict[Cell, dict[str, Any]], dict[str, Any] | None]:
    """Measure what is missing of the tasks.

    Returns:
        The row of each cell, on the first process; none elsewhere and when dry.
        Facts about the real clips, if there are any.
    """
    choice("labels", cfg.labels, ["balanced", "random"])
    check_place(cfg, "output", folder=True)
    if cfg.real_stride < 1:
        raise UserError(f"real_stride: {cfg.real_stride} is less than 1")
    fewest = max(FEWEST_CLIPS, cfg.num_classes or 0)
    if cfg.num_clips < fewest:
        raise UserError(
            f"num_clips: {cfg.num_clips} is less than {fewest}: one of each class, and two for each half of the seeds"
        )
    lines = [
        *describe(cfg, [], env.device),
        *(plan_line(cell.options(cfg), plan_of(cell)) for cell, *_ in tasks),
        f"task: {cfg.num_clips} clips of each, seeds {cfg.seed} ... {cfg.seed + cfg.num_clips - 1}, to {cfg.output}",
    ]
    if dry:
        if env.is_main:
            dry_run(cfg, lines)
        return {}, None
    source = real_clips(cfg) if cfg.real_path else None
    work = env.from_first(lambda: open_folder(cfg, tasks, env))
    real = real_features(source, env) if source else Features({}, {})  # before the long part, since it may fail
    if env.is_main:
        print("\n".join(lines))
        print(f"batches to sample: {sum(len(todo) for _, todo in work)}, processes: {env.world_size}", flush=True)
    measure(cfg, tasks, work[env.rank :: env.world_size], env)
    env.barrier()
    rows = summarize(cfg, tasks, plan_of, real.rows.get("proxy")) if env.is_main else {}
    return rows, real.report or None


def planner(cfg: MeasureConfig, device: torch.device) -> Callable[[Cell], Plan]:
    """A function that makes a cell's plan, each once: counting its MACs takes a moment.

    Raises:
        UserError: the function does, of options that contradict each other and of a plan without cached steps.
    """

    @cache
    def plan_of(cell: Cell) -> Plan:
        plan = make_plan(resolve(cell.options(cfg), device), cell.cache)
        if cell.plan != UNCACHED and not plan.cached_steps:
            raise UserError(f"plan {cell.plan} runs all {cell.steps} steps of {cell.method} in full: choose another")
        return plan

    return plan_of


def open_folder(cfg: MeasureConfig, tasks: list[Task], env: Environment) -> list[tuple[list[int], list[Task]]]:
    """Check the settings of the folder, or note them in a new one; returns batches of seeds, with what each lacks.

    Raises:
        UserError: the folder holds clips of other settings.
    """
    folder = Path(cfg.output, "clips")
    now, path = settings(cfg, env), folder / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else now
    if differ := [key for key in now if before.get(key) != now[key]]:
        old, new = (", ".join(f"{key}={values.get(key)}" for key in differ) for values in (before, now))
        raise UserError(f"{folder} holds figures of {old}, not {new}: choose another output or remove it")
    write_json(path, now)
    for file in folder.glob("*.jsonl"):
        text = file.read_text()
        write_text(file, text[: text.rfind("\n") + 1])  # a killed process may have left part of a line
    measured, twins = read_lines(folder), twins_of(tasks, cfg)

    def is_done(task: Task, seed: int) -> bool:
        own, others = measured[task.cell.name], task.pairs(cfg.eta).values()
        has_latents = task.cell not in twins or latents_path(cfg, task.cell, seed).exists()
        return seed in own.features and all(seed in own.pairs[other.name] for other in others) and has_latents

    seeds, size = list(seeds_of(cfg)), cfg.per_proc_batch_size
    batches = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    work = [(batch, [task for task in tasks if not all(is_done(task, s) for s in batch)]) for batch in batches]
    return [(batch, todo) for batch, todo in work if todo]


def settings(cfg: MeasureConfig, env: Environment) -> dict[str, Any]:
    """What figures in one folder have in common."""
    own = {f.name for f in fields(cfg)} - {f.name for f in fields(SampleConfig)}
    free = own | {"sample_method", "num_sampling_steps", "cfg_scale", "seed", "fps"}  # cells and seeds have names
    shared = sample_ddp.settings({**make_record(cfg, env.device), "device": env.device.type})
    shared = {key: value for key, value in shared.items() if key not in free and not key.startswith("cache.")}
    return {**shared, "lpips": lpips_weights()[0].is_file()}


def measure(cfg: MeasureConfig, tasks: list[Task], work: list[tuple[list[int], list[Task]]], env: Environment) -> None:
    """Sample this process's batches, and append a line for each cell and batch.

    The cells of a batch take turns, so that a machine that slows down slows all of them.
    """
    if not work:
        return
    pipe, proxy, lpips = load(cfg, env.device), load_proxy(env.device), load_lpips(env.device)
    twins = twins_of(tasks, cfg)
    # All that seconds depend on beside the cell: they compare where this is the same.
    machine = f"{describe_machine(env.device)}, processes: {env.world_size}, clips a batch: {cfg.per_proc_batch_size}"
    machine += f", attention: {cfg.attention_mode}" + ", compiled" * cfg.use_compile
    few = replace(pipe, diffusion=make_diffusion(replace(cfg, num_sampling_steps=4)))
    for task in work[0][1]:  # warms up
        sample_latents(few, work[0][0], labels_of(work[0][0], cfg), task.cell.cache)
    total = sum(task.cell.steps for _, todo in work for task in todo)
    with tqdm(total=total, unit="step", mininterval=1, disable=not env.is_main) as bar:
        for seeds, todo in work:
            labels = labels_of(seeds, cfg)
            decoded = {}  # twin -> latents (B, F, C, h, w), videos (B, F, 3, H, W)
            for task in todo:
                options = task.cell.options(cfg)
                own = replace(pipe, cfg=options, diffusion=make_diffusion(options))
                latents, seconds = timed(env.device, sample_latents, own, seeds, labels, task.cell.cache, bar.update)
                if task.cell in twins:
                    save_latents(cfg, task.cell, seeds, latents)
                videos, pairs = pipe.codec.decode(latents), {}
                for other in task.pairs(cfg.eta).values():
                    if other not in decoded:
                        theirs = load_latents(cfg, other, seeds).to(env.device)
                        decoded[other] = theirs, pipe.codec.decode(theirs)
                    pairs[other.name] = compare(latents, videos, *decoded[other], lpips)
                line = {"cell": task.cell.name, "seeds": seeds, "seconds": seconds, "machine": machine, "pairs": pairs}
                with (Path(cfg.output, "clips") / f"{env.rank}.jsonl").open("a") as file:
                    file.write(json.dumps({**line, "features": proxy(videos).tolist()}, allow_nan=False) + "\n")


def twins_of(tasks: Iterable[Task], cfg: MeasureConfig) -> set[Cell]:
    """The cells whose latents are kept, for others to be held against."""
    return {other for task in tasks for other in task.pairs(cfg.eta).values()}


def latents_path(cfg: MeasureConfig, cell: Cell, seed: int) -> Path:
    return Path(cfg.output, "clips", cell.name, f"{seed:06d}.safetensors")


def save_latents(cfg: MeasureConfig, cell: Cell, seeds: Sequence[int], latents: Tensor) -> None:
    """A file for each of (B, F, C, h, w)."""
    for seed, clip in zip(seeds, latents.cpu(), strict=True):
        with atomic_path(latents_path(cfg, cell, seed)) as temporary:
            save_file({"latents": clip.contiguous()}, temporary)


def load_latents(cfg: MeasureConfig, cell: Cell, seeds: Sequence[int]) -> Tensor:
    """(B, F, C, h, w)."""
    return torch.stack([load_file(latents_path(cfg, cell, seed))["latents"] for seed in seeds])


def read_lines(folder: Path) -> dict[str, Measured]:
    """What all processes of all runs have measured in a folder, by the cell's name; of no cell, nothing."""
    measured: dict[str, Measured] = defaultdict(Measured)
    for file in sorted(folder.glob("*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            own = measured[line["cell"]]
            own.seconds[line["machine"], tuple(line["seeds"])] = line["seconds"]
            for i, seed in enumerate(line["seeds"]):
                own.features[seed] = line["features"][i]
                for other, figures in line["pairs"].items():
                    own.pairs[other][seed] = {metric: values[i] for metric, values in figures.items()}
    return measured


def real_clips(cfg: MeasureConfig) -> Files:
    """All clips that tools/evaluate.py would take from `real_path`."""
    shared = {key: getattr(cfg, key) for key in ("real_path", "real_stride", "num_frames", "image_size")}
    return Files(EvaluateConfig(**shared), "real_path", sys.maxsize, cfg.real_stride)


def real_features(source: Files, env: Environment) -> Features:
    """Their proxy features (N, 1, D), shared out to the processes.

    Raises:
        UserError: fewer than two of the videos can be used, or too many are broken.
    """
    network = load_output("proxy", find_detector("proxy", None, Path()), env.device)
    features, report = extract(source, {"proxy": network}, source.cfg, env)
    return Features(features, source.describe() | report)


def summarize(
    cfg: MeasureConfig, tasks: list[Task], plan_of: Callable[[Cell], Plan], real: Tensor | None
) -> dict[Cell, dict[str, Any]]:
    """The figures of each cell over the seeds asked for; real: features (M, 1, D)."""
    measured, seeds = read_lines(Path(cfg.output, "clips")), seeds_of(cfg)
    labels, names = labels_of(seeds, cfg) or [], class_names(cfg)
    classes = [names[label] if names else f"class{label}" for label in labels]
    by_class = sorted(seeds, key=lambda seed: labels[seed - cfg.seed] if labels else 0)  # every other one: half of each
    features = {task.cell: torch.tensor([measured[task.cell.name].features[s] for s in by_class]) for task in tasks}
    enough = len(seeds) >= 2 * (cfg.num_classes or FEWEST_CLIPS // 2)  # every class in both halves
    seconds: dict[Cell, dict[str, dict[tuple[int, ...], float]]] = {}  # cell -> machine -> batch
    for cell in features:
        seconds[cell] = defaultdict(dict)
        for (machine, batch), value in measured[cell.name].seconds.items():
            if not set(batch).isdisjoint(seeds):
                seconds[cell][machine][batch] = value
    common = Counter(machine for own in seconds.values() for machine in own).most_common()  # most cells first
    rows = {}
    for task in tasks:
        cell, plan, own = task.cell, plan_of(task.cell), measured[task.cell.name]
        machine = next(name for name, _ in common if name in seconds[cell])
        ours, theirs = seconds[cell][machine], seconds[task.twin].get(machine, {})
        both = [theirs[batch] / ours[batch] for batch in ours if batch in theirs]
        proxy_real = None if real is None else frechet_distance(features[cell], real[:, 0])
        spread = {} if real is None else distance_spread(real, features[cell][:, None], proxy_real, BOOTSTRAP, seed=0)
        rows[cell] = {
            "name": cell.name,
            **asdict(cell),
            "full_steps": plan.full_steps,
            "cached_steps": plan.cached_steps,
            "macs": plan.macs,
            "share": plan.macs / plan_of(task.twin).macs,  # of the twin's
            "machine": machine,  # of the seconds
            "seconds": statistics.median(ours[batch] / len(batch) for batch in ours),  # of a clip
            "speedup": statistics.median(both) if both else None,  # over the twin, of batches of the same seeds
            "proxy_others": distance_to_others(features[cell], features[task.twin]) if enough else None,
            "proxy_real": proxy_real,
            "proxy_real_interval": spread.get("interval"),
        }
        for role in ("twin", "reference"):  # metric -> figures; empty where there is none or clips do not pair
            other = task.pairs(cfg.eta).get(role)
            clips = [own.pairs[other.name][seed] for seed in seeds] if other else []
            metrics = [metric for metric in METRICS if clips and metric in clips[0]]
            rows[cell][role] = {metric: aggregate([clip[metric] for clip in clips], classes) for metric in metrics}
    return rows


def seeds_of(cfg: MeasureConfig) -> range:
    return range(cfg.seed, cfg.seed + cfg.num_clips)


# ---------------------------------------------------------------------------------------------------------------------
# Telling, shared with tools/sweep.py
# ---------------------------------------------------------------------------------------------------------------------


def columns(row: dict[str, Any]) -> dict[str, str]:
    """What a table says of a row; empty where there is no figure."""
    cells = {
        "full + cached steps": f"{row['full_steps']} + {row['cached_steps']}",
        "MACs a clip": readable(row["macs"]).removesuffix("MACs"),
        "of uncached": f"{row['share']:.1%}",
        "seconds a clip": f"{row['seconds']:.2f}",
        "speed-up": "" if row["speedup"] is None else f"{row['speedup']:.2f}",
    }
    cells |= {title: plus_minus(row["twin"].get(metric), digits) for metric, (title, digits) in METRICS.items()}
    for metric in ("relative_l1", "psnr"):
        title, digits = METRICS[metric]
        cells[f"{title}, reference"] = plus_minus(row["reference"].get(metric), digits)
    for key, title in (("proxy_others", "proxy, other seeds"), ("proxy_real", "proxy, real")):
        cells[title] = "" if row[key] is None else f"{row[key]:.4g}"
    if row["proxy_real_interval"]:
        cells["proxy, real"] += " ({:.3g} ... {:.3g})".format(*row["proxy_real_interval"])
    return cells


def plus_minus(figures: dict[str, Any] | None, digits: int) -> str:
    if figures is None:
        return ""
    margin = "" if figures["margin"] is None else f" ± {figures['margin']:.{digits}f}"
    return f"{figures['mean']:.{digits}f}{margin}"


def by_class_table(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """A metric against the twin: a line for each class, a column for each row that has it."""
    title, digits = METRICS[metric]
    runs = {row["run"]: row["twin"][metric]["by_class"] for row in rows if metric in row["twin"]}
    names = next(iter(runs.values()))
    return markdown([{title: n} | {run: plus_minus(own[n], digits) for run, own in runs.items()} for n in names])


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """A table, also legible as it stands; columns that are empty in all rows are left out."""
    titles = [title for title in rows[0] if any(row[title] for row in rows)]
    lines = [titles, *([row[title] or "–" for title in titles] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    ruler = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]

    def padded(cells: Sequence[str]) -> list[str]:
        return [cells[0].ljust(widths[0]), *(c.rjust(width) for c, width in zip(cells[1:], widths[1:], strict=True))]

    head, *body = map(padded, lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ruler, *body))


def notes(cfg: MeasureConfig, tasks: list[Task], rows: Iterable[dict[str, Any]], real: dict[str, Any] | None) -> str:
    """What the figures mean."""
    seeds, (weights, url) = seeds_of(cfg), lpips_weights()
    machines: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        machines[row["machine"]].append(row.get("run", row["name"]))
    where = [f"{name}: {', '.join(own)}" if len(machines) > 1 else name for name, own in machines.items()]
    about_real = "real_path=... adds real clips"
    if real:
        about_real = f"Real: to {real['clips']} clips of {real['videos']} videos in {real['path']}, stride "
        about_real += f"{real['stride']}" + f", {real['too_short']} too short" * bool(real["too_short"])
        about_real += f", broken: {summary(real['broken'])}" if real["broken"] else ""
        about_real += "; in brackets, the 95 % interval over draws of the sampled clips"
    lines = [
        f"{len(seeds)} clips a row, seeds {seeds[0]} ... {seeds[-1]}, labels {cfg.labels}. train.py draws from hashed "
        "63-bit seeds: no training has seen this noise.",
        "Figures are against the uncached clip of the same seed; means over clips, ± half of the 95 % interval "
        "(Student's t, clips taken as independent draws).",
        "Proxy: Fréchet distance of 80 EfficientNet features, no FVD; comparable at one number of clips only. Other "
        "seeds: to the uncached clips of the other half of the seeds; uncached shows how far equals are. "
        f"{about_real}.",
        "Seconds: median over batches, sampling alone; speed-up: median over batches, each beside its twin, on one "
        f"machine with one setting. {'; '.join(where)}.",
    ]
    if any(set(task[1:]) - {None, task.cell, *task.pairs(cfg.eta).values()} for task in tasks):
        lines.append(
            "A sampler that draws noise at every step draws other noise in other steps: its clips pair with its own "
            "twins only, and have no figures against others. The proxy distances are of sets that share no noise."
        )
    if not weights.is_file():
        lines.append(f"LPIPS is left out: it needs AlexNet's weights, {url}, as {weights}.")
    return "\n".join(f"- {line}" for line in lines)


def write_text(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_record(
    path: Path, cfg: MeasureConfig, rows: list[dict[str, Any]], real: dict[str, Any] | None, env: Environment
) -> None:
    """Everything, as JSON."""
    seeds = seeds_of(cfg)
    clips = {"seeds": list(seeds), "labels": labels_of(seeds, cfg)}
    write_json(path, {**make_record(cfg, env.device), **clips, "real": real, "rows": rows})


if __name__ == "__main__":
    cli.run(main)
