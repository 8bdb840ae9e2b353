"""Downloads that continue where they stopped; a file appears under its name only when it is whole."""

import hashlib
import os
from pathlib import Path

from huggingface_hub.file_download import http_get

from configs import UserError


def download(
    url: str,
    target: Path,
    tag: str,
    size: int | None = None,
    sha256: str | None = None,
    headers: dict[str, str] | None = None,
) -> None:
    """Fetches `url` to `target`.

    hf_hub_download drops what it has when it is interrupted, so the hub's own http_get writes to a file that stays,
    and that is renamed when whole.

    Args:
        tag: of this version of the file; what is left of another version is not continued.
        size: bytes; None: the server's word.
        sha256: of the file, in hex; None: not checked.

    Raises:
        UserError: the file arrived damaged; nothing is left of it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{tag}.part")
    with partial.open("a+b") as stream:
        stream.seek(0, os.SEEK_END)
        http_get(url, stream, resume_size=stream.tell(), headers=headers, expected_size=size)
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if sha256 and digest != sha256:
        partial.unlink()
        raise UserError(f"{url} arrived damaged: run this again")
    partial.replace(target)
