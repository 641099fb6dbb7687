"""Which files of bpf/ the main programs are, and the names in types.h."""

from __future__ import annotations

import re

FILES = (
    "types.h", "maps.h", "common.h", "choice.h", "express.h", "create.c", "connect.c", "bind.c", "sockops.c", "origin.c",
    "datagram.c", "packet.h", "ingress.c", "egress.c",
)  # fmt: skip
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_ENUM = re.compile(r"enum\s+(\w+)\s*\{(.*?)\}", re.DOTALL)
_DEFINE = re.compile(r"^#define\s+(PL_\w+)\s+(0x[0-9a-fA-F]+|\d+)u?\s*$", re.MULTILINE)


def constants(types: str) -> dict[str, int]:
    """Every plain number of types.h: #defines and enumerators."""
    text = _COMMENT.sub("", types)
    found = {match[1]: int(match[2], 0) for match in _DEFINE.finditer(text)}
    for match in _ENUM.finditer(text):
        found |= _enumerators(match[2])
    return found


def reasons(types: str) -> list[str]:
    """The counters' names by number: pl_reason's, lower case, without PL_R_."""
    for match in _ENUM.finditer(_COMMENT.sub("", types)):
        if match[1] == "pl_reason":
            numbered = sorted(_enumerators(match[2]).items(), key=lambda pair: pair[1])
            return [name.removeprefix("PL_R_").lower() for name, _ in numbered if name != "PL_R_COUNT"]
    raise ValueError("types.h has no enum pl_reason")


def _enumerators(body: str) -> dict[str, int]:
    out: dict[str, int] = {}
    following = 0
    for item in filter(None, (part.strip() for part in body.split(","))):
        name, _, value = item.partition("=")
        following = int(value, 0) if value.strip() else following
        out[name.strip()] = following
        following += 1
    return out
