"""Values of options from text: YAML files and the command line are read alike, by the type of the option."""

import math
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args, get_origin

import yaml

TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NULL, MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Reads scalars as they are written (001, 12:30, on, 1e-4); an empty one, null and ~ are None."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag in (NULL, MERGE)]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if doubles := [key for key in dict.fromkeys(keys) if keys.count(key) > 1 and key != "<<"]:
            raise yaml.YAMLError(f"the key {doubles[0]} is there twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes ${...} such that OmegaConf reads it as text."""

    def represent_str(self, text: str) -> yaml.Node:
        return super().represent_str(re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


_Dumper.add_representer(str, _Dumper.represent_str)


def read_yaml(text: str) -> Any:
    """Returns the lists and mappings in YAML text. Their scalars are text, or None. Raises ValueError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def write_yaml(values: Mapping[str, Any]) -> str:
    """Returns values as YAML that `load_config` reads back."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by dotted keys as nested mappings: {"cache.interval": "2"} -> {"cache": {"interval": "2"}}.

    The last of two values for a key wins.
    """
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *groups, last = str(key).split(".")
        inner = nested
        for group in groups:
            if not isinstance(inner.get(group), dict):
                inner[group] = {}
            inner = inner[group]
        inner[last] = nest(value) if isinstance(value, Mapping) else value
    return nested


def parse(value: Any, kind: Any) -> Any:
    """Returns a value of the type `kind` from text, or from lists and mappings of text.

    Numbers are decimal. An option that may be empty takes null, or no text, as None.

    Raises:
        ValueError: the text is no such value; the message says so and needs the option's name before it.
    """
    if NoneType in get_args(kind):
        if value in (None, "", "null"):
            return None
        (kind,) = set(get_args(kind)) - {NoneType}
    name, inner = get_origin(kind) or kind, get_args(kind)
    if name is list:
        if isinstance(value, str):
            value = read_yaml(value) if value.startswith("[") else value.split(",")
        items = value if isinstance(value, list) else [value]
        return [parse(item.strip() if isinstance(item, str) else item, inner[0]) for item in items if item != ""]
    if name is dict:
        value = read_yaml(value) if isinstance(value, str) else value
        if isinstance(value, Mapping):
            return value
        raise ValueError(f"{value!r} is no group of values")
    if name is not Any and isinstance(value, Mapping | list):
        raise ValueError(f"{value!r} is a list or a group of values, but the option takes one value")
    if name is Any:
        return int(value) if isinstance(value, str) and value.isdecimal() and str(int(value)) == value else value
    if value is None:
        raise ValueError("it has no value")
    return {bool: _truth, int: _whole, float: _number, str: str}[name](value)


def _truth(text: str) -> bool:
    if text.lower() not in TRUTH:
        raise ValueError(f"{text!r} is neither True nor False")
    return TRUTH[text.lower()]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def _whole(text: str) -> int:
    try:
        return int(text)  # 010 is ten
    except ValueError:
        number = _number(text)
    if not number.is_integer():  # 1e6 is
        raise ValueError(f"{text!r} is not a whole number")
    return int(number)
