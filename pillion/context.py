"""What every command shares: where things are, and how the answer is shown."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from pillion import endpoints
from pillion.client import Client
from pillion.errors import USAGE, CliError
from pillion.output import Format

FormatOption = Annotated[Format, typer.Option("-o", "--output", help="table for people, json or yaml for machines")]
NamespaceOption = Annotated[str | None, typer.Option("-n", "--namespace", help="only this namespace")]
NodeOption = Annotated[str | None, typer.Option("--node", help="the node, where there are several")]


@dataclass
class Chosen:
    """The global options, as given."""

    controller: str | None = None
    agent: str | None = None
    lab: str | None = None

    def endpoints(self) -> endpoints.Endpoints:
        return endpoints.discover(self.controller, self.agent, self.lab, os.environ)

    def controller_client(self) -> Client:
        return Client(self.endpoints().need_controller())

    def agent_client(self, node: str | None = None) -> Client:
        return Client(self.endpoints().agent_of(node))

    def agent_clients(self) -> dict[str, Client]:
        return {node: Client(url) for node, url in self.endpoints().need_agents().items()}


def labels_of(account: str, given: list[str] | None) -> dict[str, str]:
    """Of a workload: app=<account>, and what is given as key=value. Raises CliError."""
    labels = {"app": account}
    for each in given or []:
        key, equals, value = each.partition("=")
        if not equals or not key:
            raise CliError(f"label {each!r} is not key=value", "write for example --label version=v1", USAGE)
        labels[key] = value
    return labels


chosen = Chosen()
Command = Callable[..., Any]
