"""The network namespaces the agent holds open, and what it has in them: listeners for the proxy, fresh sockets, and
the addresses of whoever lives there. Touches no map."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from mesh.link import Listener
from mesh.ports import DNS_PORT, HBONE_PORT, OUTBOUND_PORT
from nodeagent import netns as spaces  # the API's parameters are called netns
from nodeagent import takeover
from nodeagent.datapath_api import OpenListener
from nodeagent.sockdiag import SockDiag

T = TypeVar("T")

_LOOPBACK = (("outbound", OUTBOUND_PORT), ("dns-udp", DNS_PORT), ("dns-tcp", DNS_PORT))


class Place:
    """A netns we hold open."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.fd = spaces.open_netns(path)
        try:
            self.cookie, self.diag = spaces.run_in(self.fd, lambda: (spaces.cookie_here(), SockDiag()))
        except BaseException:
            os.close(self.fd)
            raise

    def run(self, call: Callable[[], T]) -> T:
        return spaces.run_in(self.fd, call)

    def close(self) -> None:
        self.diag.close()
        os.close(self.fd)


class Places:
    """By netns cookie. ``holders``: the cgroup of the proxy, which may still serve a former agent's listeners."""

    def __init__(self, holders: Path) -> None:
        self._holders = holders
        self._places: dict[int, Place] = {}
        self._by_path: dict[Path | None, int] = {}
        self._listeners: dict[str, OpenListener] = {}
        self.addresses: dict[int, tuple[str, ...]] = {}

    def __getitem__(self, cookie: int) -> Place:
        return self._places[cookie]

    def get(self, cookie: int) -> Place | None:
        """None: it was let go, or never kept."""
        return self._places.get(cookie)

    def __iter__(self) -> Iterator[Place]:
        return iter(list(self._places.values()))

    def at(self, path: Path | None) -> int | None:
        """The cookie of the netns known under this name."""
        return self._by_path.get(path)

    def keep(self, place: Place) -> int:
        """Takes it over, or closes it if its netns is held already; its cookie."""
        if place.cookie in self._places:
            place.close()
        else:
            self._places[place.cookie] = place
        self._by_path[place.path] = place.cookie
        return place.cookie

    def forget(self, cookie: int) -> None:
        self._by_path = {path: known for path, known in self._by_path.items() if known != cookie}
        self.addresses.pop(cookie, None)
        self._close_listeners(cookie)
        place = self._places.pop(cookie, None)
        if place is not None:
            place.close()

    def close(self) -> None:
        for listener in self._listeners.values():
            os.close(listener.fd)
        self._listeners.clear()
        for place in self._places.values():
            place.close()
        self._places.clear()
        self._by_path.clear()

    # ---- listeners

    def open_listeners(self, cookie: int, addresses: Sequence[str], hbone: bool) -> list[OpenListener]:
        """All that the netns needs and no others. Raises OSError when a stranger has one of the ports."""
        place = self[cookie]
        wanted = _listeners_of(cookie, addresses if hbone else ())
        self._close_listeners(cookie, but=wanted)
        opened = [self._listeners.get(key) or self._listen(place, frame) for key, frame in wanted.items()]
        self.addresses[cookie] = tuple(addresses)
        return opened

    def _close_listeners(self, cookie: int, but: Container[str] = ()) -> None:
        for key in [key for key, (frame, _) in self._listeners.items() if frame.netns == cookie and key not in but]:
            os.close(self._listeners.pop(key).fd)

    def _listen(self, place: Place, wanted: Listener) -> OpenListener:
        make = spaces.bind_udp if wanted.kind == "dns-udp" else spaces.listen_tcp
        try:
            fd = place.run(lambda: make(wanted.address, wanted.port)).detach()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # A former agent gave it to the proxy, which still serves it
            taken = takeover.take(place.diag, wanted, self._holders)
            if taken is None:
                raise
            fd = taken
        listener = self._listeners[wanted.id] = OpenListener(wanted, fd)
        return listener

    def listening(self) -> set[int]:
        """The cookies of where every listener is ours: while a stranger has one of the ports, none leads to us."""
        return set(self.addresses)

    # ---- addresses

    def whose(self, addresses: Sequence[str]) -> int:
        """The netns these addresses are in; 0 until its listeners are open (no tunnel could start before)."""
        return next((cookie for cookie, known in self.addresses.items() if set(addresses) <= set(known)), 0)


def _listeners_of(cookie: int, addresses: Sequence[str]) -> dict[str, Listener]:
    """What a netns needs, by id."""
    where = [(kind, at, port) for at in ("127.0.0.1", "::1") for kind, port in _LOOPBACK]
    where += [("hbone", at, HBONE_PORT) for at in addresses]
    frames = [Listener(f"{cookie}/{kind}/{at}", kind, cookie, at, port) for kind, at, port in where]
    return {frame.id: frame for frame in frames}
