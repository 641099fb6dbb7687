"""Parts a node can do without. Each is tried on this kernel, by doing what it does; one that fails is off, alone, with what
the kernel said, and what happens in its place is slower or less, never more open. There is no option that turns one off
but express's, which is no defence."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any

from nodeagent.datapath_api import DatapathApi, DatapathError
from nodeagent.express_probes import Failed, alone, connection
from nodeagent.sockdiag import OPEN_STATES, SockDiag

PODS, ENDING, EXPRESS = "pods", "ending", "express"
INSTEAD = {
    PODS: "no workload with a namespace of its own is enrolled; those in the node's own go on",
    ENDING: "the packets of an open connection that is denied are dropped, and its ends time out; what is older than an "
    "enrolment keeps it from being ready until it is closed",
    EXPRESS: "every request goes through the proxy",
}


def ending() -> str:
    """Why this kernel can not end a connection from outside (SOCK_DESTROY); "" where it can."""
    try:
        alone(_end_one)
    except (Failed, DatapathError, OSError) as error:
        return str(error) or type(error).__name__
    return ""


def _end_one() -> None:
    near, far = connection()
    diag = SockDiag()
    try:
        port = near.getsockname()[1]
        found = [sock for sock in diag.dump(OPEN_STATES) if sock.local_port == port]
        if len(found) != 1:
            raise Failed(f"sock_diag lists {len(found)} sockets where there is one")
        diag.destroy(found[0])
        try:
            near.recv(1)
            raise Failed("a connection was said to be ended and was not reset")
        except TimeoutError:
            raise Failed("a connection that was ended lived on") from None
        except OSError as error:
            if error.errno not in (errno.ECONNABORTED, errno.ECONNRESET):
                raise Failed(f"a connection that was ended said {os.strerror(error.errno or 0)}") from None
    finally:
        diag.close()
        for sock in (near, far):
            sock.close()


def off(datapath: DatapathApi, express: str) -> dict[str, str]:
    """Part -> why it is off. ``express``: the same of that one, "" for on."""
    return {**datapath.off(), **({EXPRESS: express} if express else {})}


def report(off: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Every part, for `GET /v1/status`."""
    return {
        part: {"on": part not in off, "why": off.get(part, ""), "instead": instead if part in off else ""}
        for part, instead in INSTEAD.items()
    }
