"""``python -m nodeagent``: one agent for one node."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import structlog

from mesh import logs
from mesh.identity import IdentityError, check_label
from mesh.notify import Notify
from nodeagent.agent import Agent
from nodeagent.api import serve
from nodeagent.datapath_api import DatapathApi
from nodeagent.fd_store import FdStore
from nodeagent.files import private_directory
from nodeagent.join import Misplaced
from nodeagent.notify import follow
from nodeagent.options import Options


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address") from error


def _node(text: str) -> str:
    try:
        return check_label(text, "node")
    except IdentityError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _url(text: str) -> str:
    if not text.startswith("https://"):
        raise argparse.ArgumentTypeError(f"{text!r} is not https://host:port: nodes speak to controllers over TLS alone")
    return text


def _absolute(text: str) -> Path:
    return Path(text).absolute()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="pillion-agent", description="Keeps one node of the mesh as the controller says.")
    add = options.add_argument
    add("--node", required=True, type=_node, help="the node's name, as in its NodeGrant and join token")
    add("--address", action="append", default=[], type=_address, help="the node's own address; once for each family")
    add("--join-token-file", type=_absolute, help="what `pillion node token NODE` printed; read again at every attempt")
    add("--controller", action="append", default=[], type=_url, help="https://host:port, instead of those in the join token")
    add("--state-dir", required=True, type=_absolute, help="keys, certificates and the last good state; made 0700")
    add("--run-dir", required=True, type=_absolute, help="agent.sock lives here")
    add("--cgroup", required=True, type=_absolute, help="ancestor of all workloads; the programs are attached there")
    add("--proxy-cgroup", type=_absolute, help="where the proxy runs, below --cgroup (default CGROUP/proxy)")
    add("--bpf-dir", type=_absolute, help="bpffs for pins (default RUN_DIR/bpf)")
    add("--proxy-dir", type=_absolute, help="where the proxy's workers listen (default RUN_DIR/proxy)")
    add("--workloads", type=_absolute, help="YAML file of this node's workloads; watched")
    add("--express", choices=("auto", "off"), default="auto", help="off: HTTP takes the proxy, always; see also MeshConfig")
    add("--fake-datapath", action="store_true", help="no kernel: everything but enforcement, to try things out")
    return options


def _datapath(arguments: argparse.Namespace) -> DatapathApi:
    if arguments.fake_datapath:
        from nodeagent.datapath_fake import FakeDatapath

        return FakeDatapath()
    from nodeagent.datapath_live import Datapath

    return Datapath(arguments.cgroup, arguments.bpf_dir or arguments.run_dir / "bpf", arguments.run_dir, arguments.proxy_cgroup)


async def _run(arguments: argparse.Namespace) -> None:
    agent = Agent(
        Options(
            node=arguments.node,
            addresses=tuple(arguments.address),
            state_dir=private_directory(arguments.state_dir),
            run_dir=arguments.run_dir,
            cgroup=arguments.cgroup,
            proxy_dir=arguments.proxy_dir or arguments.run_dir / "proxy",
            workloads=arguments.workloads,
            join_token_file=arguments.join_token_file,
            controllers=tuple(arguments.controller),
            proxy_cgroup=arguments.proxy_cgroup,
            express=arguments.express == "auto",
        ),
        _datapath(arguments),
    )
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    loop = asyncio.get_running_loop()
    stopping: set[asyncio.Task[None]] = set()

    async def stop() -> None:
        await agent.express.handed_over()
        agent.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: stopping.add(asyncio.create_task(stop())))
    store = FdStore(os.environ)
    notify = Notify(os.environ, partial(socket.socket, socket.AF_UNIX, socket.SOCK_DGRAM))
    runner = await serve(agent, arguments.run_dir / "agent.sock")
    following = asyncio.create_task(follow(agent, notify, store), name="notify")
    try:
        await agent.run()
    finally:
        notify.tell(STOPPING=1)
        following.cancel()
        await runner.cleanup()


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 after SIGTERM, 2 for a wrong command line, 1 when the agent could not go on."""
    options = parser()
    arguments = options.parse_args(argv)
    if len({":" in address for address in arguments.address}) < len(arguments.address):
        options.error("argument --address: two of one family; give one IPv4 and one IPv6 address at most")
    logs.configure(sys.stderr)
    os.umask(0o077)
    try:
        asyncio.run(_run(arguments))
    except (OSError, Misplaced) as error:
        structlog.get_logger().error("agent_failed", error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
