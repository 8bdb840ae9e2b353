"""Files: written atomically, hashed, locked, and records that say whether two runs belong together."""

import fcntl
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

from configs.errors import UserError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, in the (created) folder of `path`; it replaces `path` if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")  # no glob("*.mp4") finds it
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text`; the file appears whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, record: Any) -> None:
    """Writes `record` as indented JSON; the file appears whole or not at all."""
    write_text(path, json.dumps(record, indent=2) + "\n")


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hex. A process reads an unchanged file only once."""
    stat = Path(path).stat()
    return _file_hash(Path(path).absolute(), stat.st_size, stat.st_mtime_ns)


@cache
def _file_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(path: Path) -> IO[str] | None:
    """An exclusive lock on the file `path`, held until the returned file is closed or the process ends.

    Returns:
        The locked file; None if another process holds the lock.
    """
    file = path.open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:  # a file system without locks
        pass
    return file


def check_writable(cfg: Any, key: str, folder: bool = False) -> None:
    """Raises UserError, before the work, if no file (or folder) can be written at the path in option `key`."""
    path = Path(getattr(cfg, key)).absolute()
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if nearest.is_dir() != (folder or nearest != path):
        there, wanted = ("folder", "file") if nearest.is_dir() else ("file", "folder")
        raise UserError(f"{key}: {nearest} is a {there}, where a {wanted} is to be written: choose another path")


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their full names: {"cache": {"interval": 2}} -> {"cache.interval": 2}."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def differences(before: Mapping[str, Any], now: Mapping[str, Any], ignore: Collection[str] = ()) -> str:
    """How the settings of two runs differ, as `seed=0, not 1; num_frames=8, not 16`; empty if they agree.

    Nested settings are compared under their full names. `ignore` lists top-level settings that may differ; so may
    settings that only `before` has.
    """
    before, now = (flatten({key: value for key, value in each.items() if key not in ignore}) for each in (before, now))
    return "; ".join(f"{key}={before.get(key)}, not {now[key]}" for key in now if before.get(key) != now[key])


def check_record(path: Path, settings: Mapping[str, Any], key: str) -> bool:
    """Whether the folder of the record at `path` was begun before, with the same settings.

    Args:
        path: the JSON file that holds the settings of what lies beside it.
        settings: those of this run; all of them must be in the file with the same value.
        key: the option that gives the folder, for the error.

    Raises:
        UserError: the folder was made with other settings; the message names them.
    """
    if path.is_file():
        check_same_settings(json.loads(path.read_text()), settings, key, path.parent)
    return path.is_file()


def check_same_settings(before: Mapping[str, Any], now: Mapping[str, Any], key: str, folder: Path) -> None:
    """Raises UserError if `folder`, given by option `key`, was made with settings `before` other than those of now."""
    if differ := differences(before, now):
        raise UserError(f"{key}: {folder} was made with {differ}; choose another folder, or remove it")
