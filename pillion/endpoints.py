"""Where the controller and the agents are: told by an option, by the environment, by a running lab, or where a host has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pillion.errors import USAGE, CliError

LAB_ROOT = Path("/run/pillion/lab")  # a lab's state.json lists its endpoints
HOST_CONTROLLER = "unix:///run/pillion/controller.sock"
HOST_AGENT = "unix:///run/pillion/agent.sock"


@dataclass(frozen=True)
class Endpoints:
    """URLs, ``unix:///path`` or ``https://host:port``; agents by node ("" if the node's name is not known yet)."""

    controller: str | None = None
    agents: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""  # where they were found

    def need_controller(self) -> str:
        if self.controller is None:
            raise CliError(
                "no controller is known",
                "run this on the controller's machine, or name it (--controller https://HOST:15443); a lab: pillion lab up",
            )
        return self.controller

    def need_agents(self) -> Mapping[str, str]:
        if not self.agents:
            raise CliError(
                "no agent is known here",
                "run this on a node, or name its socket (--agent unix:///path/agent.sock); a lab: pillion lab up",
            )
        return self.agents

    def agent_of(self, node: str | None) -> str:
        """The agent of a node, or the only one."""
        agents = self.need_agents()
        if node is None:
            if len(agents) > 1:
                raise CliError(f"there are {len(agents)} nodes here", f"choose one: --node {' | '.join(agents)}", USAGE)
            return next(iter(agents.values()))
        if list(agents) == [""]:
            raise CliError(f"{node!r} cannot be chosen", "leave --node out: the one agent here is the node's own", USAGE)
        if node not in agents:
            raise CliError(f"no agent of node {node!r} is reachable here", f"there are: {', '.join(agents)}", USAGE)
        return agents[node]


def check_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        if url.startswith("unix:///") or (parts.scheme == "https" and parts.hostname and parts.port != 0):
            return url
    except ValueError:  # a port that is none
        pass
    raise CliError(f"{url!r} is no address of a controller or agent", "write unix:///path/to.sock or https://host:port", USAGE)


def labs(root: Path = LAB_ROOT) -> dict[str, Endpoints]:
    """The running labs by name."""
    found: dict[str, Endpoints] = {}
    for file in sorted(root.glob("*/state.json")):
        try:
            state = json.loads(file.read_bytes())
            if not state["mesh"] or not state.get("built"):
                continue
            agents = {node["name"]: node["agent"] for node in state["nodes"]}
            found[state["name"]] = Endpoints(state["controller"], agents, f"lab {state['name']}")
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def discover(
    controller: str | None, agent: str | None, lab: str | None, env: Mapping[str, str], root: Path = LAB_ROOT
) -> Endpoints:
    """Options first, then the environment, then a lab, then the host's own sockets."""
    running = labs(root)
    if lab is not None:
        if lab not in running:
            names = ", ".join(running) or "none"
            raise CliError(f"no lab {lab!r} with a mesh is up (running: {names})", f"run: pillion lab up --name {lab}")
        return running[lab]
    controller = controller or env.get("PILLION_CONTROLLER") or None
    agent = agent or env.get("PILLION_AGENT") or None
    if controller or agent:
        return Endpoints(
            check_url(controller) if controller else None, {"": check_url(agent)} if agent else {}, "options or environment"
        )
    if len(running) > 1 and "demo" not in running:
        raise CliError(f"{len(running)} labs are up", f"choose one: --lab {' | '.join(running)}", USAGE)
    if running:
        return running.get("demo") or next(iter(running.values()))
    here = {url: Path(url.removeprefix("unix://")).exists() for url in (HOST_CONTROLLER, HOST_AGENT)}
    return Endpoints(
        HOST_CONTROLLER if here[HOST_CONTROLLER] else None, {"": HOST_AGENT} if here[HOST_AGENT] else {}, "this host"
    )
