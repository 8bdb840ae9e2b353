"""Models on the command line."""

from collections.abc import Sequence

from configs.errors import UserError


def named_checkpoints(pairs: Sequence[str]) -> dict[str, str]:
    """The values of --model, NAME=CKPT each -> checkpoints by name.

    Raises:
        UserError: a pair without a name or a checkpoint, or a name given twice.
    """
    files = dict(pair.partition("=")[::2] for pair in pairs)
    if len(files) < len(pairs) or not all(files) or not all(files.values()):
        raise UserError(f"--model {' --model '.join(pairs)}: expected NAME=CKPT, each name once")
    return files
