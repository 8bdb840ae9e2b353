"""Compare ways to train on the same clips and seeds: optimizers, noise times, loss weights, processes, the plain twin.

    python tools/encode_latents.py --config configs/demo/demo_train.yaml       # once
    nohup nice -n 5 python tools/learning.py > results/learning.log 2>&1 &   # all candidates, two seeds, on the demo
    python tools/learning.py 'only=[recipe,muon]' steps=500                    # some of them
    python tools/learning.py 'seeds=[1]' learning_rate=5e-4                    # options of train.py change all of them
    python tools/learning.py --dry-run                                         # the commands
    python tools/plot_loss.py results/learning/*-3407/*/ --key x0_mse --smooth 1

Each run is a train.py of its own; the same command continues where it was stopped. The measure is x0_mse on held-out
clips, the mean squared error of x_0 at log-SNRs from -6 to 6, of the EMA. The table, {output}/learning.md, is written
after each run: the error at the end, the first step with the error that the reference has at its end, and seconds a
step. The reference is the recipe of the configuration at a constant rate, for reference_steps.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import ROOT, TrainConfig, UserError, cli, load_config, option
from configs.files import check_writable, write_text
from configs.tables import markdown_table

REFERENCE = "reference"
CANDIDATES = {  # name -> options beside those of the configuration
    REFERENCE: ["lr_schedule=constant"],
    "recipe": [],
    "adamw-2e-3": ["learning_rate=2e-3"],
    "muon": ["optimizer=muon"],
    "muon-2e-3": ["optimizer=muon", "learning_rate=2e-3"],
    "muon-4e-3": ["optimizer=muon", "learning_rate=4e-3"],
    "logit-normal": ["time_sampling=logit-normal"],
    "min-snr": ["min_snr=5"],
    "flow": ["process=flow"],
    "flow-logit-normal": ["process=flow", "time_sampling=logit-normal"],
    "together": ["optimizer=muon", "learning_rate=2e-3", "time_sampling=logit-normal", "min_snr=5"],
    "latte": ["model=Latte", "num_skips=0"],
    "latte-muon": ["model=Latte", "num_skips=0", "optimizer=muon"],
}
HELD_OUT = ["validation_every=100", "validation_clips=42", f"validation_path={ROOT}/datasets/demo/test"]


@dataclass(kw_only=True)
class LearningConfig(TrainConfig):
    """The comparison."""

    only: list[str] | None = option(None, "candidates; empty: all", choices=tuple(CANDIDATES))
    seeds: list[int] = option(lambda: [3407, 1], "global_seed of each run of a candidate", least=0)
    steps: int = option(2000, "steps of a candidate, to the end of its schedule", least=1)
    reference_steps: int = option(4000, "steps of the reference", least=1)
    output: str = option("results/learning", "the folder to write", path=True)


parser = cli.Parser(__doc__, LearningConfig, config=str(ROOT / "configs/demo/demo_train.yaml"))


def train_command(cfg: LearningConfig, config: str, overrides: list[str], name: str, seed: int) -> list[str]:
    """Returns the command that trains a candidate; `overrides` are those of the command line."""
    own = {each.name for each in fields(LearningConfig)} - {each.name for each in fields(TrainConfig)}
    shared = [item for item in overrides if item.partition("=")[0] not in own]
    steps = cfg.reference_steps if name == REFERENCE else cfg.steps
    run = [f"max_train_steps={steps}", f"global_seed={seed}", f"results_dir={cfg.output}/{name}-{seed}"]
    program = [sys.executable, str(ROOT / "train.py"), "--config", config]
    return [*program, *HELD_OUT, *shared, *CANDIDATES[name], *run]


def launch(command: list[str]) -> int:
    """Runs a command; returns its exit code."""
    return subprocess.run(command, check=False).returncode


def read_log(cfg: LearningConfig, name: str, seed: int) -> tuple[dict[int, float], float | None]:
    """Returns a run's x0_mse by step, and its seconds a step; empty and None before its first steps."""
    logs = sorted(Path(cfg.output).glob(f"{name}-{seed}/*/log.jsonl"))
    lines = [json.loads(line) for line in logs[-1].read_text().splitlines()] if logs else []
    rates = sorted(line["steps_per_s"] for line in lines if "steps_per_s" in line)
    errors = {line["step"]: line["x0_mse"] for line in lines if "x0_mse" in line}
    return errors, 1 / rates[len(rates) // 2] if rates else None


def table(cfg: LearningConfig, names: list[str]) -> str:
    """Returns the table in Markdown: a row for each candidate and seed that has logged an error."""
    rows = []
    for name in names:
        for seed in cfg.seeds:
            errors, seconds = read_log(cfg, name, seed)
            if not errors:
                continue
            goals = list(read_log(cfg, REFERENCE, seed)[0].values())
            reached = next((step for step, error in errors.items() if goals and error <= goals[-1]), None)
            row = {"": name, "seed": str(seed), "steps": str(max(errors)), "x0_mse": f"{errors[max(errors)]:.4f}"}
            row |= {"least x0_mse": f"{min(errors.values()):.4f}", "as low as the reference at": str(reached or "")}
            rows.append(row | {"seconds a step": f"{seconds:.2f}" if seconds else ""})
    return markdown_table(rows)


def main() -> None:
    args = parser.parse_args()
    cfg = load_config(LearningConfig, args.config, args.overrides)
    names = cfg.only or list(CANDIDATES)
    check_writable(cfg, "output", folder=True)
    commands = {  # seeds in turn, so that a whole table is there after the first
        (name, seed): train_command(cfg, args.config, args.overrides, name, seed)
        for seed in cfg.seeds
        for name in names
    }
    if args.dry_run:
        steps = sum(cfg.reference_steps if name == REFERENCE else cfg.steps for name, _ in commands)
        return cli.dry_run(cfg, [f"{len(commands)} runs, {steps:,} steps", *map(" ".join, commands.values())])
    for (name, seed), command in commands.items():
        print(" ".join(command), flush=True)
        if launch(command):
            raise UserError(f"{name}, seed {seed}: its training ended with an error, see above")
        write_text(Path(cfg.output) / "learning.md", table(cfg, names) + "\n")
    print(table(cfg, names))


if __name__ == "__main__":
    cli.run(main)
