"""flows: verdicts as they happen, of one node or of all."""

from __future__ import annotations

import json
import queue
import threading
import time
from typing import Annotated, Any

import typer

from pillion import output
from pillion.client import Client
from pillion.context import NodeOption, chosen
from pillion.errors import USAGE, CliError
from pillion.output import Format

QUEUE_FLOWS_MAX = 10_000
PAST, PAST_FOLLOWED = 100, 10  # of each node
PAST_S = 0.3  # with -f: what comes sooner is of the past, and sorted
VERDICTS = ("allowed", "denied", "audited")


def line(flow: dict[str, Any]) -> str:
    """A flow for people, on one line."""
    clock = time.strftime("%H:%M:%S", time.localtime(flow.get("time", 0)))
    source = str(flow.get("source") or "unknown").removeprefix("spiffe://")
    what = " ".join(str(flow[key]) for key in ("method", "path", "status") if flow.get(key))
    fields = (
        f"{clock}.{int(flow.get('time', 0) * 1000) % 1000:03d}",
        flow.get("node", ""),
        flow.get("verdict", "?").upper(),
        _end(source, flow.get("source_address")),
        "→",
        _end(flow.get("destination"), flow.get("destination_address")),
        "/".join(str(flow[key]) for key in ("protocol", "layer") if flow.get(key)),
        what,
        f"[{_why(flow)}]",
    )
    return output.printable(" ".join(str(field) for field in fields if field))


def _end(name: object, address: object) -> str:
    return f"{name} ({address})" if name and address else str(name or address or "?")


def _why(flow: dict[str, Any]) -> str:
    """``policy_denied by shop/web-deny#0``; one word where reason and rule are the same, as for what was allowed."""
    reason, rule = str(flow.get("reason") or ""), str(flow.get("rule") or "")
    return reason if rule in ("", reason) else f"{reason} by {rule}".strip()


def _follow(client: Client, target: str, into: queue.Queue[dict[str, Any] | CliError | None]) -> None:
    try:
        for flow in client.lines(target):
            into.put(flow)
        into.put(None)
    except CliError as error:
        into.put(error)


def flows(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="go on until interrupted")] = False,
    node: NodeOption = None,
    limit: Annotated[
        int | None, typer.Option(help=f"of the past, for each node (default: {PAST}; with -f {PAST_FOLLOWED})", min=0, max=10_000)
    ] = None,
    verdict: Annotated[str | None, typer.Option(help="only: allowed, denied or audited")] = None,
    form: Annotated[Format, typer.Option("-o", "--output", help="table, or json: one object a line")] = Format.TABLE,
) -> None:
    """What the mesh allowed and denied, and by which rule."""
    if verdict is not None and verdict not in VERDICTS:
        raise CliError(f"{verdict!r} is no verdict", f"use one of: {', '.join(VERDICTS)}", USAGE)
    if limit is None:
        limit = PAST_FOLLOWED if follow else PAST
    where = chosen.endpoints()
    urls = {node: where.agent_of(node)} if node else dict(where.need_agents())
    waiting: queue.Queue[dict[str, Any] | CliError | None] = queue.Queue(QUEUE_FLOWS_MAX)
    target = f"/v1/flows?limit={limit}{'&follow=1' if follow else ''}"
    for url in urls.values():
        threading.Thread(target=_follow, args=(Client(url), target, waiting), daemon=True).start()
    past: list[dict[str, Any]] | None = []  # of all nodes, in order; None: shown
    open_streams, failed, since = len(urls), 0, time.monotonic()
    while open_streams:
        left = since + PAST_S - time.monotonic()
        if follow and past is not None and left <= 0:
            _show_past(past, form)
            past = None
        try:
            item = waiting.get(timeout=left if follow and past is not None else None)
        except queue.Empty:
            continue
        if item is None or isinstance(item, CliError):
            open_streams -= 1
            if item is not None:
                failed += 1
                output.error(item.what, item.remedy)
        elif verdict is None or item.get("verdict") == verdict:
            if past is None:
                _show(item, form)
            else:
                past.append(item)
    _show_past(past or [], form)
    if failed == len(urls):
        raise typer.Exit(1)


def _show_past(past: list[dict[str, Any]], form: Format) -> None:
    for item in sorted(past, key=lambda flow: float(flow.get("time", 0))):
        _show(item, form)


def _show(flow: dict[str, Any], form: Format) -> None:
    print(line(flow) if form is Format.TABLE else json.dumps(flow), flush=True)
