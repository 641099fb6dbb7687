"""Joins several Prometheus texts into one: a family's samples must stand together, each source gets its labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_SAMPLE = re.compile(
    r"([a-zA-Z_:][a-zA-Z0-9_:]*)"
    r'(\{((?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\]|\\.)*",?)*)\})?'
    r"[ \t]+([+-]?(?:[0-9][0-9.eE+-]*|Inf|NaN)(?:[ \t]+-?[0-9]+)?)\Z"
)
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="(?:[^"\\]|\\.)*"')
_SUFFIXES = ("_bucket", "_count", "_sum", "_total", "_created")
_LABEL_VALUE = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def merge(sources: Iterable[tuple[Mapping[str, str], str]]) -> str:
    """``(labels to add, text)`` for each source -> one text. Lines that are not of the format are left out, and those that would
    have a label twice: a reader refuses the whole text for one of them."""
    heads: dict[str, list[str]] = {}  # family -> HELP and TYPE
    samples: dict[str, list[str]] = {}
    for labels, text in sources:
        extra = ",".join(f'{name}="{value.translate(_LABEL_VALUE)}"' for name, value in labels.items())
        declared: set[str] = set()
        for line in text.splitlines():
            if line.startswith("#"):
                parts = line.split(" ", 3)
                if len(parts) >= 3 and parts[1] in ("HELP", "TYPE"):
                    declared.add(parts[2])
                    head = heads.setdefault(parts[2], [])
                    if not any(known.startswith(f"# {parts[1]} ") for known in head):
                        head.append(line)
                continue
            match = _SAMPLE.match(line)
            if match is None:
                continue
            name, _, own, value = match.groups()
            names = _LABEL.findall(own or "")
            if len({*names, *labels}) < len(names) + len(labels):
                continue
            both = ",".join(part for part in (own.rstrip(",") if own else "", extra) if part)
            family = _family(name, declared)
            samples.setdefault(family, []).append(f"{name}{{{both}}} {value}" if both else f"{name} {value}")
    lines: list[str] = []
    for family, found in samples.items():
        lines += sorted(heads.get(family, ())) + found
    return "\n".join(lines) + "\n" if lines else ""


def _family(name: str, declared: set[str]) -> str:
    if name in declared:
        return name
    for suffix in _SUFFIXES:
        if name.endswith(suffix) and name.removesuffix(suffix) in declared:
            return name.removesuffix(suffix)
    return name
