"""The C structs of bpf/types.h as data: the loader reads them from the compiler and writes layouts.json; here they
become `struct` formats. Nothing on this side repeats a layout by hand."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

from nodeagent.datapath_api import SchemaMismatch
from nodeagent.files import Damaged, read_json

_MAPPED = bytes(10) + b"\xff\xff"


class Layout:
    """One struct: packs and unpacks by field name. Integers are int, addresses and arrays bytes."""

    def __init__(self, name: str, format: str, fields: tuple[str, ...]) -> None:
        self.name, self.format, self.fields = name, format, fields
        self._struct = struct.Struct(format)
        self._zero = dict(zip(fields, self._struct.unpack(bytes(self._struct.size)), strict=True))

    @property
    def size(self) -> int:
        return self._struct.size

    def pack(self, **values: int | bytes) -> bytes:
        """Fields not given are zero. Raises KeyError for a field the struct does not have."""
        if not values.keys() <= self._zero.keys():
            raise KeyError(f"{self.name} has no {sorted(values.keys() - self._zero.keys())}, this is a bug")
        return self._struct.pack(*(self._zero | values).values())

    def unpack(self, data: bytes) -> dict[str, Any]:
        """Every field, from the first `size` bytes. Raises struct.error when there are fewer."""
        return dict(zip(self.fields, self._struct.unpack_from(data), strict=True))


class Layouts:
    """What layouts.json of the loader holds: structs by name, constants and enumerators of types.h, reasons by number."""

    def __init__(self, structs: Mapping[str, Layout], enums: Mapping[str, int], reasons: tuple[str, ...]) -> None:
        self.structs, self.enums, self.reasons = structs, enums, reasons

    def __getitem__(self, name: str) -> Layout:
        return self.structs[name]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Layouts:
        """From the parsed JSON. Raises SchemaMismatch."""
        try:
            structs = {
                name: Layout(name, entry["format"], tuple(field[0] for field in entry["fields"]))
                for name, entry in content["structs"].items()
            }
            return cls(structs, content["constants"], tuple(content["reasons"]))
        except (KeyError, TypeError, IndexError, struct.error) as error:
            raise SchemaMismatch(
                f"layouts.json is of another version: {error!r}; restart the agent so that it is written anew"
            ) from None

    @classmethod
    def read(cls, path: Path) -> Layouts:
        """Raises SchemaMismatch when there is none, or none of ours."""
        try:
            return cls.of(read_json(path, dict[str, Any]))
        except (OSError, Damaged, AttributeError) as error:
            raise SchemaMismatch(f"{path}: {error}; the loader writes it") from None


def address(text: str) -> bytes:
    """struct pl_addr of an address: 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. Raises ValueError."""
    if ":" in text:
        return socket.inet_pton(socket.AF_INET6, text)
    return _MAPPED + socket.inet_pton(socket.AF_INET, text)


def text_address(raw: bytes) -> str:
    """The canonical text of a struct pl_addr."""
    parsed = ip_address(raw)
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return str(mapped or parsed)
