"""The three ways an application can speak IP: IPv4, IPv6, and IPv4 through an IPv6 socket."""

from __future__ import annotations

from dataclasses import dataclass

from tests.bpf.world import V4, V6


@dataclass(frozen=True)
class Family:
    """``spell`` is how the application writes an address of ours."""

    name: str
    af: str
    loopback: str
    vip: str

    def host(self, name: str) -> str:
        """The address of a workload as maps have it."""
        return V6[name] if self.name == "v6" else V4[name]

    def spell(self, address: str) -> str:
        return f"::ffff:{address}" if self.name == "mapped" else address

    def tcp(self, name: str, timeout: float = 3) -> str:
        """Code for a fresh TCP socket."""
        return f"{name} = socket.socket({self.af}, socket.SOCK_STREAM); {name}.settimeout({timeout})"

    def udp(self, name: str, timeout: float = 3) -> str:
        return f"{name} = socket.socket({self.af}, socket.SOCK_DGRAM); {name}.settimeout({timeout})"

    def server(self, name: str, address: str, port: int, kind: str = "socket.SOCK_STREAM") -> str:
        """Code for a bound (TCP: listening) socket of this family."""
        code = f"{name} = socket.socket({self.af}, {kind}); {name}.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); "
        code += f"{name}.bind(({self.spell(address)!r}, {port})); {name}.settimeout(3)"
        return code + (f"; {name}.listen(64)" if kind == "socket.SOCK_STREAM" else "")


FAMILIES = (
    Family("v4", "socket.AF_INET", "127.0.0.1", "240.0.0.10"),
    Family("v6", "socket.AF_INET6", "::1", "fd50:494c::a"),
    Family("mapped", "socket.AF_INET6", "127.0.0.1", "240.0.0.10"),
)
