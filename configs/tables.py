"""Tables as Markdown, padded so that the source is legible too, and as CSV; durations in words."""

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns a table with one row per mapping of column titles to cells. Empty columns are omitted.

    The first column is aligned to the left, the others to the right; a missing cell is shown as a dash.
    """
    titles = list(dict.fromkeys(title for row in rows for title in row))
    titles = [title for title in titles if any(row.get(title) for row in rows)]
    lines = [titles, *([row.get(title) or "–" for title in titles] for row in rows)]
    widths = [max(3, *map(len, cells)) for cells in zip(*lines, strict=True)]
    ruler = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        for cells in (lines[0], ruler, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns CSV with a header and a line per mapping of column titles to values; a missing value is empty."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, dict.fromkeys(title for row in rows for title in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def duration(seconds: float) -> str:
    """Returns a length of time in its two largest units, such as 42 s, 2 min 42 s, 3 h 5 min or 2 d 4 h."""
    total = round(seconds)
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if total >= size:
            return f"{total // size} {unit} {total % size // part} {smaller}"
    return f"{total} s"
