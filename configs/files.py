"""Atomic writes, hashes and locks of files, and comparison of the settings that two runs recorded."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from socket import gethostname
from typing import IO, Any, TypeVar

from configs.errors import UserError

T = TypeVar("T")
_CLAIMED: dict[Path, IO[str]] = {}  # folders that this process has locked


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which replaces `path` if the block succeeds.

    The folder is created if need be.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{gethostname()}-{os.getpid()}")  # hidden from glob("*.mp4")
    with telling_full_disks(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def telling_full_disks(path: Path) -> Iterator[None]:
    """Raises UserError if the block, which writes `path`, fails because the disk is full or cannot be written."""
    try:
        yield
    except Exception as error:  # torch and safetensors wrap the error of the system
        texts = f"{error} {error.__context__}"
        if not (reason := next((reason for reason in map(os.strerror, DISK_ERRORS) if reason in texts), None)):
            raise
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free
        raise UserError(f"{path} cannot be written: {reason} ({free / 2**30:.2f} GiB free on that disk)") from None


def remove_leftovers(folder: Path) -> None:
    """Removes the incomplete files that `atomic_path` left in a folder when a process of this machine was killed."""
    for path in folder.glob(f"*.tmp-{gethostname()}-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdecimal() and path.is_file() and not _is_running(int(pid)):
            path.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no number of a process
        pass
    return True


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to a file atomically. Names of files that are not UTF-8 are escaped."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def append_text(path: Path, text: str) -> None:
    """Appends `text` to a file. Names of files that are not UTF-8 are escaped."""
    with telling_full_disks(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def write_json(path: str | Path, record: Any) -> None:
    """Writes `record` to a file as indented JSON, atomically."""
    write_text(path, json.dumps(record, indent=2) + "\n")


def once_per_file(function: Callable[..., T]) -> Callable[..., T]:
    """Decorates a function of a path (and other arguments): a process reads an unchanged file only once."""

    @cache
    def read(path: Path, size: int, changed: int, *others: Any) -> T:
        return function(path, *others)

    @wraps(function)
    def wrapper(path: str | Path, *others: Any) -> T:
        stat = Path(path).stat()
        return read(Path(path).absolute(), stat.st_size, stat.st_mtime_ns, *others)

    return wrapper


@once_per_file
def file_hash(path: str | Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(path: Path) -> IO[str] | None:
    """Locks the file `path` for this process and returns it open; returns None if another process holds the lock.

    The lock is held until the file is closed or the process ends.
    """
    file = path.open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:  # the file system has no locks: go on without one
        pass
    return file


def claim_folder(folder: Path, key: str) -> None:
    """Makes a folder, locks it for this process until it ends, and removes what killed processes left in it.

    Raises:
        UserError: another process holds it; the error names `key`, the option with the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if folder not in _CLAIMED:
        file = lock(folder / ".lock")
        if not file:
            raise UserError(f"{key}: another process writes to {folder}: wait until it ends, or choose another folder")
        _CLAIMED[folder] = file
    remove_leftovers(folder)


def check_writable(cfg: Any, key: str, folder: bool = False) -> None:
    """Raises UserError if a file (or, with `folder`, a folder) cannot be written at the path in option `key`."""
    path = Path(getattr(cfg, key)).absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if nearest.is_dir() != (folder or nearest != path):
        there, wanted = ("folder", "file") if nearest.is_dir() else ("file", "folder")
        raise UserError(f"{key}: {nearest} is a {there}, where a {wanted} is to be written: choose another path")
    if not os.access(nearest if nearest.is_dir() else nearest.parent, os.W_OK | os.X_OK):
        raise UserError(f"{key}: nothing can be written in {nearest}: choose another path, or change its rights")
    if not shutil.disk_usage(nearest).free:
        raise UserError(f"{key}: the disk of {nearest} is full: make room, or choose another path")


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested options by their full names: {"cache": {"interval": 2}} -> {"cache.interval": 2}."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def differences(before: Mapping[str, Any], now: Mapping[str, Any], ignore: Collection[str] = ()) -> str:
    """Returns how the settings of two runs differ, as `seed=0, not 1; num_frames=8, not 16`; empty if they agree.

    Settings that only `before` has are not compared, nor are the top-level settings in `ignore`.
    """
    before, now = (flatten({key: value for key, value in each.items() if key not in ignore}) for each in (before, now))
    return "; ".join(f"{key}={before.get(key)}, not {now[key]}" for key in now if before.get(key) != now[key])


def check_record(path: Path, settings: Mapping[str, Any], key: str) -> bool:
    """Returns whether an earlier run with the same settings left a record at `path`.

    Args:
        path: a JSON file with the settings that its folder was made with.
        settings: the settings of this run.
        key: the option that holds the folder, named in the error.

    Raises:
        UserError: the folder was made with other settings; the error names them.
    """
    if path.is_file():
        check_same_settings(read_record(path, key), settings, key, path.parent)
    return path.is_file()


def read_record(path: Path, key: str) -> dict[str, Any]:
    """Returns the JSON record in a file; raises UserError, which names the option `key`, if it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return record
    except PermissionError:
        raise UserError(f"{key}: this user may not read {path}: choose another folder, or change its rights") from None
    except (OSError, ValueError):
        pass
    raise UserError(f"{key}: {path} is damaged, so that nothing is known of its folder: choose another, or remove it")


def check_same_settings(before: Mapping[str, Any], now: Mapping[str, Any], key: str, folder: Path) -> None:
    """Raises UserError if the settings of `now` differ from `before`, which `folder` (option `key`) was made with."""
    if differ := differences(before, now):
        raise UserError(f"{key}: {folder} was made with {differ}; choose another folder, or remove it")
