"""How an address with its port is written: ``10.0.0.1:80``, ``[fd77::1]:80``."""

from __future__ import annotations

from ipaddress import ip_address

PORT_MAX = 65_535


def host_port(address: str, port: int) -> str:
    """As flows, errors and peers have it."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def parse_host_port(text: str, least: int = 1) -> tuple[str, int]:
    """The reverse; the address is canonical then, also where the text is not. ``least``: the smallest port that is one. Raises
    ValueError."""
    host, _, digits = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    ip = ip_address(host[1:-1] if bracketed else host)
    if bracketed != (ip.version == 6) or not (digits.isascii() and digits.isdigit()) or not least <= int(digits) <= PORT_MAX:
        raise ValueError(f"{text!r} is not an address with its port")
    return str(ip), int(digits)
