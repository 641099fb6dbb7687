"""Every target by its name."""

from __future__ import annotations

from collections.abc import Callable

from fuzz.dnswire import Dns
from fuzz.hbone import Hbone
from fuzz.http1.nginx import Nginx
from fuzz.http1.requests import HttpRequests
from fuzz.http1.responses import HttpResponses
from fuzz.manifests import Manifests
from fuzz.messages import Link, Stream
from fuzz.target import Target

PLAIN: tuple[type[Target], ...] = (HttpResponses, Hbone, Dns, Link, Stream, Manifests)
NAMES = (HttpRequests.name, *(kind.name for kind in PLAIN))


def make(name: str, nginx: Nginx | None) -> Target:
    """``nginx``: for the targets that ask it."""
    if name == HttpRequests.name:
        return HttpRequests(nginx)
    makers: dict[str, Callable[[], Target]] = {kind.name: kind for kind in PLAIN}
    return makers[name]()
