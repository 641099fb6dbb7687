"""Several files as the one text that is applied, and from its lines back to theirs."""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mesh.resources import ResourceErrors, load
from mesh.yamltree import without_tabs

BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # what YAML ends a line with
SEPARATOR = "\n---\n"


class Together:
    """``texts`` by file name. ``text`` is what to send: all or none of it is applied."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = dict(texts)
        self._names = list(texts)
        self._starts: list[int] = []  # line in `text` before each file's first
        parts, lines = [], 0
        for text in texts.values():
            parts.append(without_tabs(text) if len(texts) > 1 else text)
            self._starts.append(lines)
            lines += len(BREAK.findall(text + SEPARATOR))
        self.text = SEPARATOR.join(parts)

    def errors(self) -> list[dict[str, Any]]:
        """What is wrong in the files as they are: of the first one that has faults, or what two of them say."""
        seen: dict[tuple[str, str, str], str] = {}
        twice = []
        for name, text in self._texts.items():
            try:
                resources = load(text, name)
            except ResourceErrors as error:
                return [asdict(fault) for fault in error.errors]
            for resource in resources:
                if (other := seen.setdefault(resource.key, name)) != name:
                    message = f"{'/'.join(part for part in resource.key if part)} is also in {other}"
                    fault = {"file": name, "line": 0, "field": "metadata.name", "message": message}
                    twice.append({**fault, "remedy": "keep one of them"})
        return twice

    def placed(self, error: Mapping[str, Any]) -> dict[str, Any]:
        """An error about a line of `text`, as one about a line of its file."""
        line = int(error.get("line") or 0)
        if line < 1 or len(self._names) == 1:
            return dict(error)
        index = bisect.bisect_left(self._starts, line) - 1
        return {**error, "file": self._names[index], "line": line - self._starts[index]}
