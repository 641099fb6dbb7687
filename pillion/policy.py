"""policy why: which rule decides, on what evidence, at which revision; decided here by the mesh's own evaluator."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from mesh.explain import ExplainError, Explanation
from mesh.explain import why as explain
from mesh.model import Item
from pillion import output
from pillion.context import FormatOption, chosen
from pillion.errors import USAGE, CliError
from pillion.examples import epilog
from pillion.output import Format

app = typer.Typer(help="Policies, asked aloud.", no_args_is_help=True)


class _State(msgspec.Struct):
    revision: int
    items: dict[str, Item]


@app.callback()
def _policy() -> None:
    """Policies, asked aloud."""


@app.command("why", epilog=epilog("policy why"))
def why(
    source: Annotated[str, typer.Argument(metavar="SRC", help="namespace/workload, a SPIFFE id, or unknown")],
    destination: Annotated[
        str, typer.Argument(metavar="DST", help="namespace/service, name.namespace.mesh, or namespace/workload")
    ],
    method: Annotated[str | None, typer.Argument(help="with an HTTP request: its method")] = None,
    path: Annotated[str, typer.Argument(help="and its path")] = "",
    port: Annotated[int, typer.Option(help="the service's port (default: its first)", min=0, max=65535)] = 0,
    host: Annotated[str, typer.Option(help="the request's host")] = "",
    header: Annotated[list[str] | None, typer.Option(help="name: value; may repeat")] = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Whether SRC may reach DST, and which rule says so. Exit code 0 allowed, 1 not."""
    _check_request(method, path)
    headers = {}
    for each in header or []:
        name, colon, value = each.partition(":")
        if not colon:
            raise CliError(f"header {each!r} is not name: value", "write for example --header 'x-user: ann'", USAGE)
        headers[name.strip().lower()] = value.strip()
    data = chosen.controller_client().raw("/v1/state")
    try:
        state = msgspec.json.decode(data, type=_State)
    except msgspec.MsgspecError as error:
        raise CliError(
            f"the controller's state is not understood: {error}", "use a pillion of the controller's version"
        ) from error
    try:
        found = explain(state.items, source, destination, method, path, port, host=host, headers=headers, revision=state.revision)
    except ExplainError as error:
        raise CliError(str(error), "names are namespace/name; see: pillion get all", USAGE) from error
    if form is Format.TABLE:
        _show(found)
    else:
        output.machine(msgspec.to_builtins(found), form)
    if found.outcome != "allowed":
        raise typer.Exit(1)


def _check_request(method: str | None, path: str) -> None:
    """Rules compare both as they are written, so a slip would be answered as if it were meant."""
    if method is not None and method.startswith("/"):
        raise CliError(f"{method!r} is a path, and the method comes before it", f"write for example: GET {method}", USAGE)
    if method is not None and method != method.upper():
        raise CliError(f"{method!r}: methods are written in capitals", f"write {method.upper()}", USAGE)
    if path and path != "*" and not path.startswith("/"):
        raise CliError(f"path {path!r} does not begin with /", f"write /{path}", USAGE)


def _show(found: Explanation) -> None:
    told = found.detail.removeprefix(found.outcome)  # "denied: because", "allowed by": the word is said once
    print(f"{found.outcome.upper()}{'' if told != found.detail else ': '}{output.printable(told)}")
    lines: list[tuple[str, Any]] = [
        ("source", found.source.spiffe or "unknown"),
        *(("evidence", sentence) for sentence in found.source.proof),
        ("destination", f"{found.destination} port {found.port} ({found.protocol or 'as declared'}, {found.path_kind})"),
        ("route", found.route),
        ("rule", found.rule),
        ("express", found.express),
        *(("audit", text) for text in dict.fromkeys(text for each in found.endpoints for text in each.verdict.audits)),
        ("revision", found.revision),
    ]
    for name, value in lines:
        if value:
            print(f"  {name:<12} {output.printable(value)}")
    if found.endpoints:
        print()
        rows = [
            (
                endpoint.workload.removeprefix("Workload/"),
                endpoint.node,
                endpoint.port,
                endpoint.verdict.action,
                endpoint.verdict.rule,
                ", ".join(endpoint.policies),
            )
            for endpoint in found.endpoints
        ]
        output.table(("ENDPOINT", "NODE", "PORT", "VERDICT", "RULE", "POLICIES THAT SELECT IT"), rows)
