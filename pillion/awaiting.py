"""``python -m pillion.awaiting NAMESPACE/NAME``: returns when this node's agent enforces and serves the workload. An enrolled
unit runs it first, so that nothing of the unit runs before, after a boot as well. Exit code 255 otherwise: the unit fails."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pillion.client import Client
from pillion.endpoints import HOST_AGENT
from pillion.errors import CliError

WAIT_S = 75.0  # below a unit's usual 90 s to start
LOOK_S = 0.1
SILENT_S = 2.0  # what is missing for longer is said
UNGRANTED = "identity_not_granted: "  # how the agent tells the controller's no for want of a grant
ASKED_AGAIN_S = 15.0  # such a no that stands so long is no older than a grant: agents ask again every ten
FAILED = 255  # lower ones would only skip the unit


def await_workload(client: Client, namespace: str, name: str, wait_s: float = WAIT_S, ungranted_s: float = float("inf")) -> str:
    """Empty, or what is missing after ``wait_s``; sooner where it has no grant for ``ungranted_s``. Other refusals may pass by
    themselves, as a port does that another workload is about to give back. What it waits for is said, each time it changes."""
    began = time.monotonic()
    deadline, ungranted_since, said = began + wait_s, float("inf"), ""
    while True:
        try:
            missing = _missing(client, namespace, name)
        except CliError as error:
            missing = error.what
        now = time.monotonic()
        ungranted_since = min(now, ungranted_since) if missing.startswith(UNGRANTED) else float("inf")
        if not missing or now > deadline or now - ungranted_since >= ungranted_s:
            return missing
        if missing != said and now - began >= SILENT_S:
            text = f"waits up to {deadline - now:.0f} s for {namespace}/{name} to be enforced: {missing}"
            print(f"pillion: {text}", file=sys.stderr, flush=True)
            said = missing
        time.sleep(LOOK_S)


def _missing(client: Client, namespace: str, name: str) -> str:
    for each in client.get("/v1/status", timeout_s=10.0)["workloads"]:
        if (each["namespace"], each["name"]) == (namespace, name):
            try:
                inode = Path(each["cgroup"]).stat().st_ino
            except OSError:
                return f"its cgroup {each['cgroup']} is not there"
            if each["cgroup_id"] != inode:
                return "the agent knows an older cgroup of it"
            return str(each["detail"])
    return "the agent does not know it"


def main() -> int:
    """The exit code."""
    if len(sys.argv) != 2 or sys.argv[1].count("/") != 1:
        print("usage: python -m pillion.awaiting NAMESPACE/NAME", file=sys.stderr)
        return FAILED
    namespace, _, name = sys.argv[1].partition("/")
    missing = await_workload(Client(HOST_AGENT), namespace, name)
    if missing:
        print(f"pillion: {sys.argv[1]} is not enforced, so it does not start: {missing}", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
