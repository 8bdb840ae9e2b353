"""Checkpoints given on the command line."""

from configs.errors import UserError


def named_checkpoints(wanted: list[str]) -> dict[str, str]:
    """Files by name, from `NAME=CKPT` each; UserError for another form or a name given twice."""
    files = dict(item.partition("=")[::2] for item in wanted)
    if len(files) < len(wanted) or not all(files.values()):
        raise UserError(f"--model {' --model '.join(wanted)}: expected NAME=CKPT, each name once")
    return files
