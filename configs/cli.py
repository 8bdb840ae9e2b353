"""The command line that every program shares: its flags, --help, --dry-run, key=value pairs, and one-line errors.

Nothing here imports torch: --help and mistakes of typing are answered at once.
"""

import argparse
import difflib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Any

from configs import default_of, limits_of, option_groups, to_yaml
from configs.errors import UserError

PATIENCE = 5.0  # seconds that a rank keeps its error to itself: rank 0 mostly fails alike and speaks for all
WIDTH, COLUMN = 120, 36  # of --help, and where the meanings begin


class Parser(argparse.ArgumentParser):
    """The shared flags; a program adds its own with `add_argument`. Mistakes raise `UserError`.

    Args:
        doc: the program's docstring, shown by --help as it stands.
        schema: the dataclass of the program's options, or None: no --config and no key=value pairs. --help lists its
            options, and a flag named like one is explained.
        config: the default YAML file.
    """

    def __init__(self, doc: str, schema: type | None = None, config: str | None = None):
        self.schema = schema
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.add_argument("--dry-run", action="store_true", help="say what would run, check its files, and stop")
        if schema:
            self.add_argument(
                "--config", default=config, metavar="YAML", help="options of the run (default: %(default)s)"
            )
            self.add_argument("overrides", nargs="*", metavar="key=value", help="options that win over the YAML file")

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        """Flags and key=value pairs in any order.

        argparse takes key=value pairs behind a flag with several values for more of those; they are moved back.
        """
        parsed, unknown = self.parse_known_intermixed_args(args)
        if unknown:
            raise UserError(f"unknown flag {unknown[0].partition('=')[0]}{self._hint(unknown[0].partition('=')[0])}")
        for action in self._actions:
            values = getattr(parsed, action.dest, None)
            if self.schema and action.nargs == "+" and values:
                parsed.overrides += [value for value in values if "=" in value]
                setattr(parsed, action.dest, [value for value in values if "=" not in value])
        return parsed

    def answer_help(self) -> None:
        """Answers --help, if it is on the command line, and exits. Programs call this before they import torch."""
        if {"-h", "--help"} & set(sys.argv[1:]):
            self.print_help()
            sys.exit()

    def format_help(self) -> str:
        """argparse's help, and every option with its default and meaning."""
        return super().format_help() + (describe_options(self.schema) if self.schema else "")

    def error(self, message: str) -> None:
        raise UserError(message)

    def _hint(self, flag: str) -> str:
        flags = [option for action in self._actions for option in action.option_strings]
        keys = [each.name for each in fields(self.schema)] if self.schema else []
        near = difflib.get_close_matches(flag, flags + [f"--{key}" for key in keys], n=1)
        meant = near[0] if near and near[0] in flags else f"{near[0][2:]}=VALUE" if near else "--help"
        return f"; did you mean {meant}?"


def describe_options(schema: type) -> str:
    """A line for each option of `schema`: key=default, then its meaning, limits and choices."""
    lines = ["", "options as key=value, or in the YAML file"]
    for title, group in option_groups(schema):
        lines += ["", title]
        for each in group:
            if is_dataclass(nested := default_of(each)):
                lines += [line for inner in fields(nested) for line in _describe(inner, f"{each.name}.")]
            else:
                lines += _describe(each)
    return "\n".join(lines) + "\n"


def _describe(option: Field, prefix: str = "") -> list[str]:
    default = default_of(option)
    facts = [limits_of(option), " | ".join(map(str, option.metadata["choices"] or ()))]
    meaning = option.metadata["help"] + "".join(f" ({fact})" for fact in facts if fact)
    head = f"  {prefix}{option.name}={'' if default is None else default}"
    text = textwrap.wrap(meaning, WIDTH - COLUMN)
    if len(head) < COLUMN:
        head += " " * (COLUMN - len(head)) + text.pop(0)
    return [head, *(" " * COLUMN + line for line in text)]


def dry_run(cfg: Any, lines: Iterable[str], checks: Iterable[Callable[[], object]] = ()) -> None:
    """On the first process: prints what would run, a comment a line, and the options as YAML; then checks the files.

    Args:
        checks: each raises UserError if a file that the run reads is missing.

    Raises:
        UserError: names everything that is missing.
    """
    if rank():
        return
    print("\n".join(f"# {line}" for line in lines), to_yaml(cfg), sep="\n", end="", flush=True)
    missing = []
    for check in checks:
        try:
            check()
        except UserError as error:
            missing.append(str(error))
    if missing:
        raise UserError("; ".join(dict.fromkeys(missing)))


def rank() -> int:
    """Number of this process among those that torchrun started."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def run(main: Callable[[], object]) -> None:
    """Calls `main`; a `UserError` becomes one line on stderr and exit code 1, Ctrl-C one line and 130."""
    try:
        main()
    except UserError as error:
        if rank():
            time.sleep(PATIENCE)  # torchrun ends this process when rank 0 has gone
        print(f"error: {error}" + (f" (rank {rank()})" if rank() else ""), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        if not rank():
            print("interrupted", file=sys.stderr)
        sys.exit(130)
