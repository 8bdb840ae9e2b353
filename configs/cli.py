"""The command line that every program shares: its flags, --help, --dry-run, key=value pairs, and one-line errors.

Nothing here imports torch, so that --help and typing errors are answered at once.
"""

import argparse
import os
import re
import select
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, fields, is_dataclass
from types import FrameType
from typing import Any

from configs import default_of, limits_of, option_groups, to_yaml
from configs.errors import UserError, suggest_option
from configs.original import other_names, our_name
from configs.values import TRUTH

PATIENCE = 10.0  # seconds that ranks other than 0 wait before printing an error, which rank 0 usually has too
PAIR = re.compile(r"[A-Za-z_][\w.]*=")  # how key=value begins; results/a=b is a path
WIDTH, COLUMN = 120, 36  # of --help: characters per line, and the column where descriptions begin


class Parser(argparse.ArgumentParser):
    """A parser with the shared flags; a program adds its own with `add_argument`. Mistakes raise `UserError`.

    Args:
        doc: the program's docstring, which --help prints unchanged.
        schema: the dataclass of the program's options. None: the program takes no --config and no key=value pairs.
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
        """Returns the flags, and key=value pairs and other words as `overrides`, in the order in which they were given.

        `--key value` and `--key=value` mean key=value, for options and for the program's own flags.
        """
        flags = {flag: action for action in self._actions for flag in action.option_strings}
        options = {each.name: each for each in fields(self.schema)} if self.schema else {}
        words, rest, overrides = list(sys.argv[1:] if args is None else args), [], []
        while words:
            word = words.pop(0)
            head, equals, value = word.partition("=")
            key = head[2:].replace("-", "_")
            if head in flags:
                rest.append(word)
                if flags[head].nargs is None and not equals:  # its value
                    rest += words[:1]
                    del words[:1]
            elif head.startswith("--") and our_name(key, options).partition(".")[0] in options:
                overrides.append(f"{key}={value if equals else self._value_of(head, options.get(key), words)}")
            elif (
                PAIR.match(word) and f"--{head}" in flags and (head not in options or is_dataclass(options[head].type))
            ):
                rest.append(f"--{word}")
            elif PAIR.match(word) and self.schema:
                overrides.append(word)
            else:
                rest.append(word)
        parsed, unknown = self.parse_known_intermixed_args(rest)
        if unknown:
            flag = unknown[0].partition("=")[0]
            raise UserError(f"unknown flag {flag}{suggest_option(flag, [*options, *flags])}")
        for item in overrides:
            name = our_name(item.partition("=")[0], options).partition(".")[0]
            if getattr(parsed, name, None):
                raise UserError(f"--{name} and {item} both set {name}: leave one out")
        if self.schema:
            parsed.overrides = overrides + parsed.overrides
        return parsed

    def _value_of(self, flag: str, option: Field | None, words: list[str]) -> str:
        """Returns the value that follows an option's flag, and removes it from `words`; a switch needs none."""
        if option and option.type is bool and (words[:1] or [""])[0].lower() not in TRUTH:
            return "True"
        if not words or words[0].startswith("--"):
            raise UserError(f"{flag}: expected one value, as in {flag} VALUE")
        return words.pop(0)

    def answer_help(self) -> None:
        """Prints the help and exits if the command line asks for it. Programs call this before they import torch."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _leave)
        if {"-h", "--help"} & set(sys.argv[1:]):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            self.print_help()
            sys.exit()

    def format_help(self) -> str:
        """Returns argparse's help followed by every option with its default and description."""
        return super().format_help() + (describe_options(self.schema) if self.schema else "")

    def error(self, message: str) -> None:
        raise UserError(message)


def describe_options(schema: type) -> str:
    """Returns a line for each option of `schema`: key=default, description, limits and choices."""
    lines = ["", "options as key=value or --key value, or in the YAML file"]
    for title, group in option_groups(schema):
        lines += ["", title]
        for each in group:
            if is_dataclass(each.type):
                lines += [line for inner in fields(each.type) for line in _describe(inner, f"{each.name}.")]
            else:
                lines += _describe(each, others=other_names(each.name, [each.name for each in fields(schema)]))
    return "\n".join(lines) + "\n"


def _describe(option: Field, prefix: str = "", others: Sequence[str] = ()) -> list[str]:
    default = default_of(option)
    facts = [limits_of(option), " | ".join(map(str, option.metadata["choices"] or ()))]
    facts += [f"also: {', '.join(others)}"] if others else []
    description = option.metadata["help"] + "".join(f" ({fact})" for fact in facts if fact)
    head = f"  {prefix}{option.name}={'' if default is None else default}"
    text = textwrap.wrap(description, WIDTH - COLUMN)
    if len(head) < COLUMN:
        head += " " * (COLUMN - len(head)) + text.pop(0)
    return [head, *(" " * COLUMN + line for line in text)]


def dry_run(cfg: Any, lines: Iterable[str], checks: Iterable[Callable[[], object]] = ()) -> None:
    """Prints the run and its options as YAML, then checks its files. Only the first process does so.

    Args:
        lines: describe the run; each is printed as a comment.
        checks: functions that raise UserError if a file is missing.

    Raises:
        UserError: files are missing; the error names all of them.
    """
    if rank():
        return
    print("\n".join(f"# {line}" for line in lines), to_yaml(cfg), sep="\n", end="", flush=True)
    check_all(checks)


def check_all(checks: Iterable[Callable[[], object]]) -> None:
    """Calls functions that raise UserError; raises one UserError with all of their messages."""
    messages = []
    for check in checks:
        try:
            check()
        except UserError as error:
            messages.append(str(error))
    if messages:
        raise UserError("; ".join(dict.fromkeys(messages)))


def rank() -> int:
    """Returns the rank of this process among those that torchrun started; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Returns the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Returns the number of processes that torchrun started on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def run(main: Callable[[], int | None]) -> None:
    """Calls `main` and exits with the code that it returns.

    A `UserError` is printed as one line (exit code 2), and so are an error of a file (closed to the user, gone, on a
    bad disk, ...) and Ctrl-C (exit code 130). If the reader of the output has left (`| head`), the end is silent (141).
    """
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        code = _call(main)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # Python flushes both when it ends
            os.dup2(nowhere, stream)
        code = 128 + signal.SIGPIPE
    if code:
        sys.exit(code)


def _call(main: Callable[[], int | None]) -> int | None:
    try:
        return main()
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and not error.filename:
            raise
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        if rank():
            time.sleep(PATIENCE)  # torchrun ends this process once rank 0 has exited
        print(f"error: {message}" + (f" (rank {rank()})" if rank() else ""), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if not rank():
            print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _reader_has_left() -> bool:
    """Returns whether stdout or stderr is a pipe that no process reads any more."""
    streams = select.poll()
    for stream in (1, 2):
        streams.register(stream, 0)
    return any(event & select.POLLERR for _, event in streams.poll(0))


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends the process at Ctrl-C, while it imports torch."""
    os.write(2, b"" if rank() else b"interrupted\n")
    os._exit(128 + number)
