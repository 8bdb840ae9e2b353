"""The command line that every program shares: `--config`, `--dry-run`, `key=value` pairs, and one-line errors."""

import argparse
import dataclasses
import difflib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence

from configs import UserError

PATIENCE = 5.0  # seconds that a rank keeps its error to itself: rank 0 mostly fails alike and speaks for all


class Parser(argparse.ArgumentParser):
    """The shared flags; a program adds its own with `add_argument`. Mistakes raise `UserError`.

    Args:
        doc: the program's docstring, shown by --help as it stands.
        schema: the dataclass of the program's options, or None: no --config and no key=value pairs. --help lists its
            keys, and a flag named like one is explained.
        config: the default YAML file.
    """

    def __init__(self, doc: str, schema: type | None = None, config: str | None = None):
        self.keys = [field.name for field in dataclasses.fields(schema)] if schema else []
        super().__init__(
            description=doc,
            epilog=textwrap.fill("keys: " + " ".join(self.keys), 100) if schema else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--dry-run", action="store_true", help="say what would run, and stop")
        if schema:
            self.add_argument(
                "--config", default=config, metavar="YAML", help="options of the run (default: %(default)s)"
            )
            self.add_argument("overrides", nargs="*", metavar="key=value", help="options that win over the YAML file")

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        """Flags and key=value pairs in any order."""
        parsed, unknown = self.parse_known_intermixed_args(args)
        if unknown:
            flag = unknown[0].partition("=")[0]
            flags = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(flag, flags + [f"--{key}" for key in self.keys], n=1)
            hint = near[0] if near and near[0] in flags else f"{near[0][2:]}=VALUE" if near else "--help"
            raise UserError(f"unknown flag {flag}; did you mean {hint}?")
        return parsed

    def error(self, message: str) -> None:
        raise UserError(message)


def run(main: Callable[[], object]) -> None:
    """Calls `main`; a `UserError` becomes one line on stderr and exit code 1, Ctrl-C one line and 130."""
    rank = int(os.environ.get("RANK", 0))
    try:
        main()
    except UserError as error:
        if rank:
            time.sleep(PATIENCE)  # torchrun ends this process when rank 0 has gone
        print(f"error: {error}" + (f" (rank {rank})" if rank else ""), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted", file=sys.stderr)
        sys.exit(130)
