"""Cells: ways to sample, compared over paired seeds. The engine of tools/fidelity.py and tools/sweep.py.

A cell is one way to sample: solver, steps, guidance, cache plan. Its twin is the same sampler uncached. Each process
appends a line for each cell and batch to `{output}/clips/{rank}.jsonl`; a later run measures only what is missing.
Letters: B batch, F frames, C channels of the latents, D proxy features, M real clips.
"""

import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from configs import CacheOptions, SampleConfig, absolute_path, cli
from configs.errors import UserError
from configs.files import atomic_path, check_record, check_writable, file_hash, write_json, write_text
from configs.tables import markdown_table
from datasets import class_names
from datasets.clips import summary
from models.hardware import describe_machine, timed
from models.macs import readable
from sample.distributed import Environment
from sample.folder import clip_settings, labels_of, make_record
from sample.media import to_uint8
from sample.options import file_checks
from sample.pipeline import load, resolve, sample_latents, shortened, with_options
from sample.plans import UNCACHED, Plan, describe_plan, describe_run, make_plan, parse_plan, plan_name
from sample.recipes import check_recipe, load_recipe
from sample.similarity import doubts, is_flat
from tools.metrics.clips import VideoFiles
from tools.metrics.detectors import find_detector, load_output
from tools.metrics.features import Features, extract
from tools.metrics.options import ClipOptions, MeasureConfig
from tools.metrics.pairs import PAIR_METRICS, aggregate, compare, distance_to_others, load_lpips, lpips_weights
from tools.metrics.protocols import fill_in
from tools.metrics.scores import NEAR, change_of_distance, distance_to_real, neighbourhoods
from tools.metrics.statistics import GROUPS, difference_interval, interval_text, plus_minus, ratio_interval

RATIOS = ("relative_l1", "lpips", "motion_error", "mp4_lpips")  # errors, of which ratios are told
VERSION = 2  # of measurements; raise it when the code measures other values of the same clips


@dataclass(frozen=True)
class Cell:
    """One way to sample."""

    method: str
    steps: int
    guidance: float
    cache: CacheOptions = UNCACHED
    recipe: str | None = None  # a file, in place of method, steps and cache, which are then those of the twin

    @property
    def plan(self) -> str:
        return Path(self.recipe).stem if self.recipe else plan_name(self.cache)

    @property
    def name(self) -> str:
        version = f"-{file_hash(self.recipe)[:8]}" if self.recipe else ""
        return f"{self.method}-{self.steps}-g{self.guidance:g}-{self.plan}{version}"

    def options(self) -> dict[str, Any]:
        """The SamplerOptions that sample this way."""
        steps = {"sample_method": self.method, "num_sampling_steps": self.steps}
        return steps | {"cfg_scale": self.guidance, "cache": self.cache, "recipe": self.recipe}

    def with_plan(self, text: str) -> "Cell":
        """The same sampler by a plan as --cache takes it, or by a recipe: a path that ends in .json."""
        if text.endswith(".json"):
            return replace(self, recipe=str(absolute_path(text, Path.cwd())))
        return self.with_cache(parse_plan(text))

    def with_cache(self, cache: CacheOptions) -> "Cell":
        """The same sampler with another cache. There is one uncached cell: without a cache its options mean nothing."""
        return replace(self, cache=UNCACHED if cache.is_off else cache)

    def draws_noise(self, eta: float) -> bool:
        """Whether the sampler draws noise at every step, not only the first."""
        method = load_recipe(self.recipe).solver if self.recipe else self.method
        return method == "ddpm" or (method == "ddim" and eta > 0)


class Task(NamedTuple):
    """A cell, and the cells that it is compared with. Their own tasks come first."""

    cell: Cell
    twin: Cell  # uncached; also the measure of speed
    reference: Cell | None = None
    controls: tuple[Cell, ...] = ()  # others that cost as much; the best of those whose clips pair is the control

    def pairs(self, eta: float) -> dict[str, Cell]:
        """The other cells whose clips pair with this cell's, by role.

        Clips of one seed pair if both draw the same noise: at the same steps, or only at the first one.
        """

        def pair(other: Cell) -> bool:
            same_steps = other.with_cache(self.cell.cache) == self.cell  # of no recipe, which has steps of its own
            return same_steps or not (self.cell.draws_noise(eta) or other.draws_noise(eta))

        others = {"twin": self.twin, "reference": self.reference}
        return {role: other for role, other in others.items() if other not in (None, self.cell) and pair(other)}


@dataclass
class Measured:
    """All measurements of one cell."""

    seconds: dict[tuple[str, tuple[int, ...]], float] = field(default_factory=dict)  # of a batch, by machine and seeds
    features: dict[int, list[float]] = field(default_factory=dict)  # (D,) by seed
    flat: dict[int, bool] = field(default_factory=dict)  # by seed; empty if measured before there was `is_flat`
    pairs: dict[str, dict[int, dict[str, float]]] = field(default_factory=lambda: defaultdict(dict))  # other, seed


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def run_cells(
    cfg: MeasureConfig, tasks: list[Task], plan_of: Callable[[Cell], Plan], dry: bool, env: Environment
) -> tuple[dict[Cell, dict[str, Any]], dict[str, Any] | None]:
    """Measures what is missing of the tasks; with `dry`, only prints what would run and checks the files.

    Returns:
        rows: the row of each cell, on the first process; empty on the others, and with `dry`.
        real: facts about the real clips; None without real clips.
    """
    cfg.check_clips()
    check_writable(cfg, "output", folder=True)
    lines = describe_run(cfg, [], env.device)
    lines += [describe_plan(with_cell(cfg, cell), plan_of(cell)) for cell, *_ in tasks]
    lines.append(f"task: {cfg.num_clips} clips of each, seeds {cfg.seed} ... {seeds_of(cfg)[-1]}, to {cfg.output}")
    if dry:
        cli.dry_run(cfg, lines, [*file_checks(cfg), *([lambda: real_clips(cfg)] if cfg.real_path else [])])
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


def with_cell(cfg: MeasureConfig, cell: Cell) -> MeasureConfig:
    """`cfg` with the sampler's options of `cell`."""
    return replace(cfg, **cell.options())


def planner(cfg: MeasureConfig, device: torch.device) -> Callable[[Cell], Plan]:
    """A function from a cell to its plan, which makes each plan once: counting the MACs takes a moment.

    The function raises UserError for options that contradict each other, and for a plan that caches no step.
    """

    @cache
    def plan_of(cell: Cell) -> Plan:
        options = resolve(with_cell(cfg, cell), device)
        if cell.recipe:
            check_recipe(options)
        plan = make_plan(options)
        if cell.cache != UNCACHED and not plan.cached_steps:
            raise UserError(f"plan {cell.plan} runs all {cell.steps} steps of {cell.method} in full: choose another")
        return plan

    return plan_of


def seeds_of(cfg: MeasureConfig) -> range:
    """The seeds of the clips of every cell."""
    return range(cfg.seed, cfg.seed + cfg.num_clips)


def open_folder(cfg: MeasureConfig, tasks: list[Task], env: Environment) -> list[tuple[list[int], list[Task]]]:
    """Checks the settings of the output folder, or writes them to a new one.

    Returns:
        The batches of seeds that are not finished, each with the tasks that it lacks.

    Raises:
        UserError: the folder holds clips of other settings.
    """
    folder = Path(cfg.output, "clips")
    settings = shared_settings(cfg, env)
    check_record(folder / "settings.json", settings, "output")
    write_json(folder / "settings.json", settings)
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


def shared_settings(cfg: MeasureConfig, env: Environment) -> dict[str, Any]:
    """The settings that all measurements in one folder share. Cells and seeds are named in each line and may differ."""
    own = {f.name for f in fields(cfg)} - {f.name for f in fields(SampleConfig)}
    free = own | {"sample_method", "num_sampling_steps", "cfg_scale", "cache", "seed", "fps"}
    shared = clip_settings(make_record(cfg, env.device))
    shared = {key: value for key, value in shared.items() if key not in free}
    return {**shared, "lpips": lpips_weights()[0].is_file(), "fidelity": cfg.fidelity, "measured_by": VERSION}


def measure(cfg: MeasureConfig, tasks: list[Task], work: list[tuple[list[int], list[Task]]], env: Environment) -> None:
    """Samples this process's batches, and appends a line for each cell and batch.

    The cells of a batch take turns, so that a machine that slows down slows all of them.
    """
    if not work:
        return
    pipe, proxy, lpips = load(cfg, env.device), proxy_network(env.device), load_lpips(env.device)
    twins = twins_of(tasks, cfg)
    # All that the seconds depend on, beside the cell. Seconds compare only where this is the same.
    machine = f"{describe_machine(env.device)}, processes: {env.world_size}, clips a batch: {cfg.per_proc_batch_size}"
    machine += f", attention: {cfg.attention_mode}" + ", compiled" * cfg.use_compile
    cells = dict.fromkeys(task.cell for _, todo in work for task in todo)
    ways = {cell: with_options(pipe, **cell.options()) for cell in cells}
    for task in work[0][1]:  # warms up
        own = ways[task.cell]
        sample_latents(shortened(own, own.plan), work[0][0], labels_of(work[0][0], cfg))
    total = sum(len(ways[task.cell].plan.full) for _, todo in work for task in todo)
    with tqdm(total=total, unit="step", mininterval=1, disable=not env.is_main) as bar:
        for seeds, todo in work:
            labels = labels_of(seeds, cfg)
            decoded = {}  # twin -> latents (B, F, C, h, w), videos (B, F, 3, H, W)
            for task in todo:
                latents, seconds = timed(env.device, sample_latents, ways[task.cell], seeds, labels, None, bar.update)
                if task.cell in twins:
                    save_latents(cfg, task.cell, seeds, latents)
                videos, pairs = pipe.codec.decode(latents), {}
                for other in task.pairs(cfg.eta).values():
                    if other not in decoded:
                        theirs = load_latents(cfg, other, seeds).to(env.device)
                        decoded[other] = theirs, pipe.codec.decode(theirs)
                    pairs[other.name] = compare(latents, videos, *decoded[other], lpips, cfg.fidelity)
                line = {"cell": task.cell.name, "seeds": seeds, "seconds": seconds, "machine": machine, "pairs": pairs}
                pixels = torch.from_numpy(to_uint8(videos)).movedim(-1, -3)  # (B, F, 3, H, W)
                line |= {"features": proxy(pixels)[:, 0].tolist(), "flat": [*map(is_flat, videos)]}
                with (Path(cfg.output, "clips") / f"{env.rank}.jsonl").open("a") as file:
                    file.write(json.dumps(line, allow_nan=False) + "\n")


def twins_of(tasks: Iterable[Task], cfg: MeasureConfig) -> set[Cell]:
    """The cells that others are compared with. Their latents are kept."""
    return {other for task in tasks for other in task.pairs(cfg.eta).values()}


def latents_path(cfg: MeasureConfig, cell: Cell, seed: int) -> Path:
    """The file of the latents of one clip."""
    return Path(cfg.output, "clips", cell.name, f"{seed:06d}.safetensors")


def save_latents(cfg: MeasureConfig, cell: Cell, seeds: Sequence[int], latents: Tensor) -> None:
    """Writes a file for each clip of latents (B, F, C, h, w)."""
    for seed, clip in zip(seeds, latents.cpu(), strict=True):
        with atomic_path(latents_path(cfg, cell, seed)) as temporary:
            save_file({"latents": clip.contiguous()}, temporary)


def load_latents(cfg: MeasureConfig, cell: Cell, seeds: Sequence[int]) -> Tensor:
    """The latents (B, F, C, h, w) that `save_latents` wrote."""
    return torch.stack([load_file(latents_path(cfg, cell, seed))["latents"] for seed in seeds])


def read_lines(folder: Path) -> dict[str, Measured]:
    """The measurements in a folder by the name of the cell; empty for a cell that was not measured."""
    measured: dict[str, Measured] = defaultdict(Measured)
    for file in sorted(folder.glob("*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            own = measured[line["cell"]]
            own.seconds[line["machine"], tuple(line["seeds"])] = line["seconds"]
            own.flat |= dict(zip(line["seeds"], line.get("flat", ()), strict=False))
            for i, seed in enumerate(line["seeds"]):
                own.features[seed] = line["features"][i]
                for other, metrics in line["pairs"].items():
                    own.pairs[other][seed] = {metric: values[i] for metric, values in metrics.items()}
    return measured


def real_clips(cfg: MeasureConfig) -> VideoFiles:
    """All clips in `real_path`, as tools/evaluate.py reads them."""
    keys = ("real_path", "real_stride", "real_fps", "short_clips", "num_frames", "image_size")
    shared = {key: getattr(cfg, key) for key in keys}
    return VideoFiles(fill_in(ClipOptions(**shared)), "real_path", sys.maxsize, cfg.real_stride)


def proxy_network(device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from clips (B, F, 3, H, W) uint8 to proxy features (B, 1, D)."""
    return load_output("proxy", find_detector("proxy", None, Path()), device)


def real_features(source: VideoFiles, env: Environment) -> Features:
    """Proxy features (M, 1, D) of real clips, the same on every process; the processes share the work.

    Raises:
        UserError: fewer than two of the videos can be used, or too many are broken.
    """
    found = extract(source, {"proxy": proxy_network(env.device)}, source.cfg, env)
    return found._replace(report=source.describe() | found.report)


# ---------------------------------------------------------------------------------------------------------------------
# Summarizing
# ---------------------------------------------------------------------------------------------------------------------


def summarize(
    cfg: MeasureConfig, tasks: list[Task], plan_of: Callable[[Cell], Plan], real: Tensor | None
) -> dict[Cell, dict[str, Any]]:
    """The row of each cell: means and margins over the seeds of `cfg`, costs, proxy distances.

    Args:
        real: proxy features (M, 1, D) of the real clips.
    """
    measured, seeds = read_lines(Path(cfg.output, "clips")), seeds_of(cfg)
    labels, names = labels_of(seeds, cfg) or [], class_names(cfg)
    classes = [names[label] if names else f"class{label}" for label in labels]
    # Sorted by class, so that every other seed is half of each class.
    by_class = sorted(seeds, key=lambda seed: labels[seed - cfg.seed] if labels else 0)
    features = {task.cell: torch.tensor([measured[task.cell.name].features[s] for s in by_class]) for task in tasks}
    enough = len(seeds) >= 2 * (cfg.num_classes or 1)  # every class in both halves
    seconds = {cell: seconds_by_machine(measured[cell.name], seeds) for cell in features}
    common = Counter(machine for own in seconds.values() for machine in own).most_common()  # most cells first
    rows = {}
    for task in tasks:
        cell, plan, own = task.cell, plan_of(task.cell), measured[task.cell.name]
        machine = next(name for name, _ in common if name in seconds[cell])
        ours, theirs = seconds[cell][machine], seconds[task.twin].get(machine, {})
        both = [theirs[batch] / ours[batch] for batch in ours if batch in theirs]
        to_real = {} if real is None else distance_to_real(real, features[cell][:, None], GROUPS)
        pairs = {role: other.name for role, other in task.pairs(cfg.eta).items()}
        rows[cell] = {
            "name": cell.name,
            "method": cell.method,
            "steps": cell.steps,
            "guidance": cell.guidance,
            "plan": cell.plan,
            "full_steps": plan.full_steps,
            "cached_steps": plan.cached_steps,
            "macs": plan.macs,
            "share": plan.macs / plan_of(task.twin).macs,  # of the twin's
            "machine": machine,  # of the seconds
            "seconds": statistics.median(ours[batch] / len(batch) for batch in ours),  # of a clip
            "speedup": statistics.median(both) if both else None,  # over the twin, of batches of the same seeds
            "proxy_others": distance_to_others(features[cell], features[task.twin]) if enough else None,
            "proxy_real": to_real.get("value"),
            "proxy_real_interval": to_real.get("interval"),
            "proxy_real_change": None,  # against the twins
            "diversity": None if real is None else neighbourhoods(real[:, 0], features[cell]),  # by the proxy's
            "flat": [own.flat.get(seed, False) for seed in seeds],  # nearly of one color
            "control": None,  # name of the best control against the twins
        }
        if real is not None and "twin" in pairs:
            rows[cell]["proxy_real_change"] = change_of_distance(real[:, 0], features[cell], features[task.twin])
        for role in ("twin", "reference"):  # metric -> summary; empty without that cell, or if clips do not pair
            clips = [own.pairs[pairs[role]][seed] for seed in seeds] if role in pairs else []
            metrics = [metric for metric in PAIR_METRICS if clips and metric in clips[0]]
            rows[cell][role] = {metric: aggregate([clip[metric] for clip in clips], classes) for metric in metrics}
            # What each control that pairs has against the same clips.
            found = {other.name: measured[other.name].pairs.get(pairs.get(role), {}) for other in task.controls}
            rivals = {name: [of[s] for s in seeds] for name, of in found.items() if clips and of.keys() >= set(seeds)}
            best = min(rivals, key=lambda name: sum(clip["relative_l1"] for clip in rivals[name]), default=None)
            paired = {metric: against(metric, clips, rivals[best]) for metric in metrics if best}
            rows[cell][f"{role}_control"] = {metric: interval for metric, interval in paired.items() if interval}
            rows[cell]["control"] = rows[cell]["control"] or best
    return rows


def against(metric: str, clips: list[dict[str, float]], controls: list[dict[str, float]]) -> dict[str, float] | None:
    """The paired interval of a metric: of ratios of errors, of differences else. None where an error is 0."""
    values = [[clip[metric] for clip in each] for each in (clips, controls)]
    if metric not in RATIOS:
        return difference_interval(*values)
    return ratio_interval(*values) if min(map(min, values)) > 0 else None


def seconds_by_machine(measured: Measured, seeds: Sequence[int]) -> dict[str, dict[tuple[int, ...], float]]:
    """Seconds of the batches that hold any of `seeds`: machine -> seeds of the batch -> seconds."""
    found: dict[str, dict[tuple[int, ...], float]] = defaultdict(dict)
    for (machine, batch), value in measured.seconds.items():
        if not set(batch).isdisjoint(seeds):
            found[machine][batch] = value
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Reporting
# ---------------------------------------------------------------------------------------------------------------------


def columns(row: dict[str, Any]) -> dict[str, str]:
    """A row's cells in a table by their titles; a cell without a number is empty."""
    cells = {
        "full + cached steps": f"{row['full_steps']} + {row['cached_steps']}",
        "MACs a clip": readable(row["macs"]).removesuffix("MACs"),
        "of uncached": f"{row['share']:.1%}",
        "seconds a clip": f"{row['seconds']:.2f}",
        "speed-up": "" if row["speedup"] is None else f"{row['speedup']:.2f}",
    }
    cells |= {title: plus_minus(row["twin"].get(metric), digits) for metric, (title, digits) in PAIR_METRICS.items()}
    for metric in ("relative_l1", "psnr"):
        title, digits = PAIR_METRICS[metric]
        cells[f"{title}, reference"] = plus_minus(row["reference"].get(metric), digits)
        for role in ("twin", "reference"):
            sign, equal = ("/", 1) if metric in RATIOS else ("−", 0)
            name = f"{title.partition(',')[0]} {sign} control's" + ", reference" * (role == "reference")
            cells[name] = interval_text(row[f"{role}_control"].get(metric), 2, equal)
    for key, title in (("proxy_others", "proxy, other seeds"), ("proxy_real", "proxy, real")):
        cells[title] = "" if row[key] is None else f"{row[key]:.4g}"
    if row["proxy_real_interval"]:
        cells["proxy, real"] += " ({:.3g} ... {:.3g})".format(*row["proxy_real_interval"])
    if row["diversity"]:
        cells |= {key: f"{row['diversity'][key]:.3f}" for key in ("precision", "recall", "density", "coverage")}
    if row["proxy_real_change"]:
        cells["proxy, real − uncached"] = interval_text(row["proxy_real_change"], 1, equal=0)
        cells["p"] = f"{row['proxy_real_change']['p']:.2g}"
    return cells


def by_class_table(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """A table of a metric against the twin: a line for each class, a column for each row that has the metric."""
    title, digits = PAIR_METRICS[metric]
    runs = {row["run"]: row["twin"][metric]["by_class"] for row in rows if metric in row["twin"]}
    names = next(iter(runs.values()))
    return markdown_table([{title: n} | {run: plus_minus(own[n], digits) for run, own in runs.items()} for n in names])


def notes(cfg: MeasureConfig, tasks: list[Task], rows: Sequence[dict[str, Any]], real: dict[str, Any] | None) -> str:
    """A Markdown list that says how to read the numbers."""
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
        about_real += f", {real['flat']} nearly of one color" if real["flat"] else ""
        about_real += "; precision, recall, density and coverage are of the same features (arXiv:2002.09797)"
        about_real += (
            "; in brackets, the 95 % interval over sampled clips (jackknife). Minus uncached: "
            "the paired difference to the row uncached; p is that of a permutation test, which swaps clips of a seed"
        )
    lines = [
        f"{len(seeds)} clips a row, seeds {seeds[0]} ... {seeds[-1]}, labels {cfg.labels}. train.py draws from hashed "
        "63-bit seeds: no training has seen this noise.",
        "Metrics are against the uncached clip of the same seed: means over clips, ± half of the 95 % interval "
        "(Student's t, clips taken as independent draws). Two rows have the same seeds, so these intervals do not "
        "compare them. The columns with a control do: they show the mean of the clips' differences, or the geometric "
        "mean of the ratios of their errors, with its interval. Not resolved: the interval holds both answers. The "
        "control is the best row without a cache of layers at or below the row's cost, judged on these same clips.",
        "Proxy: Fréchet distance of 80 EfficientNet features, no FVD. It compares at one number of clips only, and is "
        f"too high by itself with fewer than {NEAR * 80}. Other "
        "seeds: to the uncached clips of the other half of the seeds; the row uncached shows how far equals are. "
        f"{about_real}.",
        "Seconds: median over batches, sampling alone. Speed-up: median over batches, each beside its twin, on one "
        f"machine with one setting. {'; '.join(where)}.",
    ]
    if any({task.twin, task.reference} - {None, task.cell, *task.pairs(cfg.eta).values()} for task in tasks):
        lines.append(
            "A sampler that draws noise at every step draws other noise in other steps. Its clips pair only with its "
            "own twins; against others they have no metrics. Proxy distances compare sets that share no noise."
        )
    twins = {cell.name for cell in twins_of(tasks, cfg)}
    flat = [each for row in rows if row["name"] in twins for each in row["flat"]]
    cached = [row["twin"]["psnr"]["each"] for row in rows if row["cached_steps"] and row["twin"]]
    lines += [f"**{doubt}.**" for doubt in doubts(flat, chain(*cached))]
    if not weights.is_file():
        lines.append(f"LPIPS is left out: it needs AlexNet's weights, {url}, as {weights}.")
    return "\n".join(f"- {line}" for line in lines)


def write_record(
    path: Path, cfg: MeasureConfig, rows: list[dict[str, Any]], real: dict[str, Any] | None, env: Environment
) -> None:
    """Writes the options, seeds, labels, facts about the real clips and rows as JSON."""
    seeds = seeds_of(cfg)
    clips = {"seeds": list(seeds), "labels": labels_of(seeds, cfg)}
    write_json(path, {**make_record(cfg, env.device), **clips, "real": real, "rows": rows})
