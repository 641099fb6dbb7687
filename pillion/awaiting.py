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
FAILED = 255  # lower ones would only skip the unit


def await_workload(client: Client, namespace: str, name: str, wait_s: float = WAIT_S) -> str:
    """Empty, or what is missing."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            missing = _missing(client, namespace, name)
        except CliError as error:
            missing = error.what
        if not missing or time.monotonic() > deadline:
            return missing
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
