"""Downloads that continue after an interruption. A file gets its name only when it is complete."""

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
    """Downloads `url` to `target`, or the rest of it after an interruption.

    hf_hub_download deletes an incomplete file when it is interrupted. So the hub's http_get writes to a file that
    stays, and that is renamed when it is complete.

    Args:
        tag: names this version of the file; an incomplete download of another version is not continued.
        size: in bytes; None: the size that the server reports.
        sha256: in hex; None: not checked.

    Raises:
        UserError: the hash is wrong; the file is deleted.
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
