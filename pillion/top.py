"""top: who uses the nodes' proxies, by identity."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from pillion import output
from pillion.client import Client
from pillion.context import NodeOption, chosen
from pillion.errors import CliError
from pillion.output import Format

INTERVAL_S = 1.0
COLUMNS = ("NODE", "IDENTITY", "CONNS", "STREAMS", "REQ/S", "HANDSHAKES/S", "BYTES HELD", "SOCKETS", "TIME", "REFUSED")

Sample = dict[str, dict[str, Any]]  # node -> what /v1/top said


def sample(urls: dict[str, str], silent: dict[str, CliError]) -> Sample:
    """Of the nodes that answer; why another did not is put into ``silent``, and shown when that is new. Raises if none does."""
    found = {}
    for name, url in urls.items():
        try:
            found[name] = Client(url).get("/v1/top")
            silent.pop(name, None)
        except CliError as error:
            if len(urls) == 1:
                raise
            if name not in silent:
                output.error(error.what, error.remedy)
            silent[name] = error
    if not found:
        raise next(iter(silent.values()))
    return found


def usage(before: Sample, now: Sample) -> list[dict[str, Any]]:
    """One entry for each node and identity: what is taken now, and rates between the two samples; the busiest first."""
    rows = []
    for node, report in now.items():
        earlier = before.get(node, {"identities": (), "time": 0.0})
        old = {entry["identity"]: entry for entry in earlier["identities"]}
        seconds = max(report["time"] - earlier["time"], 1e-3)
        for entry in report["identities"]:
            was = old.get(entry["identity"], {"asked": {}, "seconds": 0.0})

            def rate(what: str, entry: dict[str, Any] = entry, was: dict[str, Any] = was, seconds: float = seconds) -> float:
                # a worker that was started anew begins at 0
                return float(max(entry["asked"].get(what, 0) - was["asked"].get(what, 0), 0)) / seconds

            rows.append(
                {
                    "node": node,
                    "identity": entry["identity"],
                    **entry["used"],
                    "requests_per_s": round(rate("requests"), 1),
                    "handshakes_per_s": round(rate("handshakes"), 1),
                    "worker_share": round(max(entry["seconds"] - was["seconds"], 0.0) / seconds / max(report["workers"], 1), 4),
                    "refused": entry["refused"],
                    "max": entry["max"],
                }
            )
    return sorted(rows, key=lambda row: (-row["worker_share"], -row.get("connections", 0), row["node"], row["identity"]))


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    refused = " ".join(f"{reason.removeprefix('budget_')}:{count}" for reason, count in sorted(row["refused"].items()))
    return (
        row["node"],
        row["identity"],
        row.get("connections", 0),
        row.get("streams", 0),
        f"{row['requests_per_s']:.0f}",
        f"{row['handshakes_per_s']:.0f}",
        _bytes(row.get("bytes_in_flight", 0)),
        row.get("descriptors", 0),
        f"{row['worker_share']:.1%}",
        refused,
    )


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def top(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="refresh until interrupted")] = False,
    node: NodeOption = None,
    interval: Annotated[float, typer.Option(help="seconds between two looks", min=0.1, max=60)] = INTERVAL_S,
    form: Annotated[Format, typer.Option("-o", "--output", help="table, json or yaml")] = Format.TABLE,
) -> None:
    """Who uses the proxy, by identity: what it holds, asks and costs, and what was refused over its budget."""
    where = chosen.endpoints()
    urls = {node: where.agent_of(node)} if node else dict(where.need_agents())
    silent: dict[str, CliError] = {}
    before = sample(urls, silent)
    while True:
        time.sleep(interval)
        now = sample(urls, silent)
        rows = usage(before, now)
        output.look(COLUMNS, rows, _cells, form, follow)
        if not follow:
            return
        before = now
