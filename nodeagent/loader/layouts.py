"""Struct layouts as the compiler has them, as data: what Python packs and unpacks across a map comes from here.

A layout is ``{"size", "format", "fields": [[name, offset, size, kind]]}``. ``format`` is for `struct` with explicit padding,
one value for each field; kind is u8, u16, u32, u64, addr (struct pl_addr, 16 bytes) or bytes (any other array or struct).
"""

from __future__ import annotations

import ctypes
from typing import Any

CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}
ADDRESS = "pl_addr"


def layout_of(type_: Any) -> dict[str, Any]:
    """The layout of a ctypes type as BCC makes them; a plain integer has one field ``value``."""
    if issubclass(type_, ctypes._SimpleCData):
        members: list[tuple[str, Any, int]] = [("value", type_, 0)]
    else:
        members = [(field[0], field[1], getattr(type_, field[0]).offset) for field in type_._fields_]
    fields: list[list[Any]] = []
    parts = ["<"]
    at = 0
    for name, kind, offset in members:
        size = ctypes.sizeof(kind)
        if name.startswith("__pad"):
            continue
        if offset > at:
            parts.append(f"{offset - at}x")
        at = offset + size
        if issubclass(kind, ctypes._SimpleCData):
            parts.append(CODES[size])
            fields.append([name, offset, size, f"u{size * 8}"])
        else:
            parts.append(f"{size}s")
            fields.append([name, offset, size, "addr" if kind.__name__ == ADDRESS else "bytes"])
    total = ctypes.sizeof(type_)
    if total > at:
        parts.append(f"{total - at}x")
    return {"size": total, "format": "".join(parts), "fields": fields}


def name_of(type_: Any) -> str:
    """The struct's name, or "" for an integer."""
    return "" if issubclass(type_, ctypes._SimpleCData) else str(type_.__name__)


def nested(type_: Any) -> dict[str, Any]:
    """Layouts of the struct and of every struct inside it, by name."""
    if issubclass(type_, ctypes._SimpleCData):
        return {}
    if issubclass(type_, ctypes.Array):
        return nested(type_._type_)
    out = {name_of(type_): layout_of(type_)}
    for field in type_._fields_:
        out |= nested(field[1])
    return out
