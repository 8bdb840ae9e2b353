"""Documents as a page shows them: numbers and JSON for tables, Markdown as HTML, files as text and as data URIs."""

import re
from base64 import b64encode
from decimal import Decimal
from mimetypes import guess_type
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from markdown import Markdown
from markdown.treeprocessors import Treeprocessor

from configs import ROOT, UserError

MOST_LISTED = 20  # entries of a list in JSON that are shown
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
NUMBER = re.compile(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?")
QUANTITY = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?\s?[^\W\d]*%?")  # a number with its unit
UNITS = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M"}


def readable(value: Any) -> dict[str, Any]:
    """The text that shows a value, its exact form where the text is rounded, and whether it is a number.

    Large numbers get a unit (20.0 G), fractions four digits. Integers below a million stay as they are.
    """
    text = exact = "" if value is None else str(value)
    if NUMBER.fullmatch(exact):
        number = float(exact)
        size = abs(float(f"{number:.3g}"))  # 999,999,999 is 1.00 G
        if 1e6 <= abs(number) < 1e18:
            unit = next(unit for unit in UNITS if unit <= size)
            text = f"{number / unit:#.3g}".rstrip(".") + f" {UNITS[unit]}"
        elif not exact.lstrip("-+").isdecimal() and len(Decimal(exact).as_tuple().digits) > 4:
            text = f"{number:.0f}" if 1e4 <= size < 1e6 else f"{number:#.4g}".rstrip(".")
    return {"text": text, "exact": "" if text == exact else exact, "number": bool(QUANTITY.fullmatch(text))}


def tree(value: Any) -> Any:
    """JSON as nested tables {header, rows, more}: alike records are rows of one, all else is listed by entry."""
    if not isinstance(value, dict | list):
        return value
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    more, items = max(0, len(items) - MOST_LISTED), items[:MOST_LISTED]
    if items and all(isinstance(entry, dict) for _, entry in items):
        columns = list(dict.fromkeys(key for _, entry in items for key in entry))
        rows = [[str(name), *(tree(entry.get(column, "")) for column in columns)] for name, entry in items]
        return {"header": ["", *columns], "rows": rows, "more": more}
    if isinstance(value, list) and not any(isinstance(entry, dict | list) for entry in value):
        return ", ".join(readable(entry)["text"] for _, entry in items) + (f" and {more} more" if more else "")
    return {"header": [], "rows": [[str(name), tree(entry)] for name, entry in items], "more": more}


class SelfContained(Treeprocessor):
    """Fits parsed Markdown into the page: links lose their targets, pictures come along, tables scroll."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder.resolve()

    def run(self, root: Any) -> None:
        for element in list(root.iter()):
            if element.tag == "a":
                element.attrib.clear()
            elif element.tag == "img":
                path = (self.folder / unquote(element.get("src"))).resolve()
                if path.suffix in PICTURES and path.is_relative_to(self.folder) and path.is_file():
                    element.set("src", data_uri(path))
                else:
                    element.tag, element.attrib = "span", {}  # empty
            elif re.fullmatch("h[1-6]", element.tag):
                element.tag = f"h{min(6, int(element.tag[1]) + 2)}"  # below those of the page
            elif element.tag == "td" and not len(element):
                cell = readable(element.text)
                element.text = cell["text"]
                element.attrib |= {"title": cell["exact"]} if cell["exact"] else {}
            elif element.tag == "table":
                table = element.makeelement("table", {})
                table[:] = element[:]
                element.tag, element[:], element.attrib = "div", [table], {"class": "scroll", "tabindex": "0"}


def markdown(text: str, folder: Path) -> str:
    """The HTML of a Markdown text. HTML in it is shown as text; pictures come from inside `folder` or are left out."""
    parser = Markdown(extensions=["tables", "fenced_code"])
    parser.preprocessors.deregister("html_block")
    parser.inlinePatterns.deregister("html")
    parser.treeprocessors.register(SelfContained(folder), "self_contained", 15)  # after the inline patterns, 20
    return parser.convert(text)


def read_text(path: Path) -> str:
    """The text of a file, in which paths inside the repository are relative to its root."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}") from None
    return re.sub(rf"(?<![\w./-]){re.escape(str(ROOT))}/", "", text)


def data_uri(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} is missing")
    return f"data:{guess_type(path)[0]};base64,{b64encode(path.read_bytes()).decode()}"
