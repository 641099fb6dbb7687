"""The mesh on such a host from a source tree, by the units of deploy/systemd, without an install: where the units and
`pillion enrol` are what is tested, and seconds count. By deploy/install.sh it is in tests/deploy/restarts.py."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path

from lab.host.container import ADDRESSES, Container
from lab.lab import grants
from lab.pace import SLOW
from lab.state import LabError

SOURCE, VENV = "/srv/source", "/srv/venv"  # in there, read-only
CURRENT = "/opt/pillion/current"
READY_S = 90.0 * SLOW
MODULES = {"pillion": "pillion", "pillion-agent": "nodeagent", "pillion-proxy": "l7proxy", "pillion-controller": "controller"}
NODE = "n1"
PREPARE = r"""
set -e
cd /srv/source/deploy/systemd
mkdir -p /usr/local/lib/systemd/system /etc/pillion
cp ./* /usr/local/lib/systemd/system/
for each in pillion-controller pillion-proxy; do
    useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin "$each"
done
ln -s "$1" /usr/local/bin/pillion
echo "PILLION_CONTROLLER_OPTIONS=--listen $2:15443" >/etc/pillion/controller.env
printf 'PILLION_NODE=%s\nPILLION_AGENT_OPTIONS=--address %s --address %s\n' "$4" "$2" "$3" >/etc/pillion/agent.env
echo "PILLION_PROXY_OPTIONS=--workers 1" >/etc/pillion/proxy.env
echo "workloads: []" >/etc/pillion/workloads.yaml
chmod 0600 /etc/pillion/workloads.yaml
mkdir -p /run/pillion
ln -s ../pillion-controller/controller.sock /run/pillion/controller.sock
systemctl daemon-reload
systemctl start pillion-controller
pillion apply -f /srv/grants.yaml
umask 077
pillion node token "$4" >/etc/pillion/join-token
systemctl start --no-block pillion-proxy pillion-agent
"""


class HostMesh:
    """`start` once; then services come and go by `unit` and `pillion`."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.run = container.run

    def start(self) -> None:
        """A controller and a node that is ready. Raises LabError."""
        wrapper = '#!/bin/sh\nexec env PYTHONPATH={} PYTHONDONTWRITEBYTECODE=1 {}/bin/python -m {} "$@"\n'
        for name, module in MODULES.items():
            self.container.put(f"{CURRENT}/bin/{name}", wrapper.format(SOURCE, VENV, module).encode(), 0o755)
        self.container.put("/srv/grants.yaml", grants([(NODE, "shop")]).encode())
        arguments = [f"{CURRENT}/bin/pillion", *ADDRESSES, NODE]
        self.run(["sh", "-c", PREPARE, "sh", *arguments], check=True, timeout=READY_S)
        self.until(lambda: self.container.active("pillion-agent", "pillion-proxy"), "the node is ready")

    def until(self, done: Callable[[], object], what: str) -> None:
        end = time.monotonic() + READY_S
        while not done():
            if time.monotonic() > end:
                log = self.run(["journalctl", "-n", "30", "--no-pager", "-o", "cat"]).stdout
                raise LabError(f"not within {READY_S:.0f} s: {what}", log[-3000:])
            time.sleep(0.1)

    def unit(self, name: str, *lines: str) -> None:
        """A service that is known to systemd, not yet to the mesh."""
        text = "\n".join(("[Service]", *lines)) + "\n"
        self.container.put(f"/etc/systemd/system/{name}.service", text.encode())
        self.run(["systemctl", "daemon-reload"], check=True)

    def pillion(self, *arguments: str, check: bool = True) -> str:
        """What the command line said: output and errors."""
        done = self.run(["pillion", *arguments], timeout=READY_S)
        if check and done.returncode:
            raise LabError(f"pillion {shlex.join(arguments)}: exit code {done.returncode}", done.stdout + done.stderr)
        return done.stdout + done.stderr

    def apply(self, text: str) -> None:
        self.run(["pillion", "apply", "-f", "-", "--wait"], input=text, check=True, timeout=READY_S)


def binds(source: Path, venv: Path) -> dict[str, Path]:
    """What the container must see, for `Container(…, binds=…)`; the source where the environment looks for it as well."""
    return {SOURCE: source, VENV: venv, str(source): source}
