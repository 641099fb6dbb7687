"""YAML (and so JSON) text to plain data that knows its lines: what operators write, read strictly.

Only what configuration needs: mappings with text keys, sequences, text, whole and decimal numbers, true, false, null.
Anchors, aliases, tags, merge keys and repeated keys are refused; size, depth and the number of documents are bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

TEXT_BYTES_MAX = 8 << 20
DOCUMENTS_MAX = 20_000
DEPTH_MAX = 32
NODES_MAX = 2_000_000

Path = tuple[str | int, ...]

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where the wheel has it
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?")
_NUMBER_CHARS_MAX = 20


class YamlError(ValueError):
    """The text is not what configuration may be. ``line`` counts from 1."""

    def __init__(self, line: int, message: str, remedy: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message
        self.remedy = remedy


def shown(path: Path) -> str:
    """As errors name a field: ``spec.ports[0].port``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


@dataclass(slots=True)
class Document:
    """One document's data, and the line of each path in it (keys and list indexes from the root)."""

    data: object
    line: int
    lines: dict[Path, int] = field(default_factory=dict)

    def line_of(self, path: Path) -> int:
        """The line of the path, or of the nearest thing around it."""
        while path:
            if path in self.lines:
                return self.lines[path]
            path = path[:-1]
        return self.line


def parse(text: str) -> list[Document]:
    """Every document that is not empty. Raises YamlError."""
    if len(text.encode("utf-8", "surrogatepass")) > TEXT_BYTES_MAX:
        raise YamlError(1, f"the text is larger than {TEXT_BYTES_MAX} bytes", "apply it in parts")
    try:
        return list(_documents(_Events(yaml.parse(without_tabs(text), Loader=_Loader))))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(mark.line + 1 if mark else 1, f"not YAML: {problem}", "fix the syntax at this line") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise YamlError(1, f"not YAML: {str(error).splitlines()[0]}", "use UTF-8 text without control characters") from error


def without_tabs(text: str) -> str:
    """JSON may be indented by tabs, YAML not; within JSON strings there are none. What is not JSON stays as it is."""
    if "\t" not in text or text.lstrip()[:1] not in ("{", "["):
        return text
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text.replace("\t", " ")


class _Events:
    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self.count = 0

    def next(self) -> yaml.Event:
        event = next(self._events)
        self.count += 1
        line = _line(event)
        if self.count > NODES_MAX:
            raise YamlError(line, f"more than {NODES_MAX} nodes", "apply it in parts")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise YamlError(line, "anchors and aliases are not taken", "write the value out")
        return event


def _documents(events: _Events) -> Iterator[Document]:
    count = 0
    while not isinstance(event := events.next(), yaml.StreamEndEvent):
        if not isinstance(event, yaml.DocumentStartEvent):
            continue
        count += 1
        first = events.next()
        document = Document(None, _line(first))
        if count > DOCUMENTS_MAX:
            raise YamlError(document.line, f"more than {DOCUMENTS_MAX} documents", "apply it in parts")
        document.data = _node(events, first, (), document)
        events.next()  # the document's end
        if document.data is not None:
            yield document


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark is not None else 1


def _node(events: _Events, event: yaml.Event, path: Path, document: Document) -> object:
    line = _line(event)
    document.lines.setdefault(path, line)
    if len(path) > DEPTH_MAX:
        raise YamlError(line, f"nested deeper than {DEPTH_MAX}", "no resource is that deep")
    if isinstance(event, yaml.NodeEvent) and (tag := getattr(event, "tag", None)) not in (None, "!"):
        raise YamlError(line, f"tag {tag} is not taken", "remove the tag")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event, line)
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[object] = []
        while not isinstance(inner := events.next(), yaml.SequenceEndEvent):
            items.append(_node(events, inner, (*path, len(items)), document))
        return items
    mapping: dict[str, object] = {}
    while not isinstance(key := events.next(), yaml.MappingEndEvent):
        at = _line(key)
        if not isinstance(key, yaml.ScalarEvent):
            raise YamlError(at, "a key must be text", "write key: value")
        name = key.value
        if name == "<<":
            raise YamlError(at, "merge keys are not taken", "write the values out")
        if name in mapping:
            raise YamlError(at, f"key {name!r} appears twice", "keep one of them")
        document.lines[(*path, name)] = at
        mapping[name] = _node(events, events.next(), (*path, name), document)
    return mapping


def _scalar(event: yaml.ScalarEvent, line: int) -> object:
    value: str = event.value
    if event.style not in (None, ""):
        return value
    if value in ("", "~", "null"):
        return None
    if value in ("true", "false"):
        return value == "true"
    if _INT.fullmatch(value) or _FLOAT.fullmatch(value):
        if len(value) > _NUMBER_CHARS_MAX:
            raise YamlError(line, f"number of {len(value)} digits", 'if it is text, write it in quotes ("…")')
        return int(value) if _INT.fullmatch(value) else float(value)
    return value
