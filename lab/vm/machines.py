"""The part of docs/kernels.md about a mesh of two machines: its steps, and what was lost under load. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lab.vm.capabilities import Outcome, Run

LOAD, FACT = "load: ", "fact: "  # what the steps record begins so


def section(run: Run | None) -> list[str]:
    """Lines of the document."""
    lines = ["", "## Two machines, two kernels", ""]
    if run is None:
        return [*lines, "Not run."]
    facts = _noted(run.outcomes, FACT)
    lines += [
        f"{facts.get('machines', '')}, both from `deploy/install.sh` alone (tests/kernels/test_two_hosts.py), {run.day},",
        f"{run.seconds:.0f} s. The steps, in this order:",
        "",
    ]
    if run.error:
        lines += [f"The run did not come to its end: {run.error}", ""]
    for each in run.outcomes:
        words = each.name.removeprefix("test_").replace("_", " ")
        lines.append(f"- {'**failed**' if each.message else 'seen'}: {words}{': ' + each.message if each.message else ''}")
    told = {name: text for name, text in facts.items() if name != "machines"}
    if told:
        lines += ["", *(f"{name}: {text}." for name, text in told.items())]
    return lines + _losses(_noted(run.outcomes, LOAD))


def _noted(outcomes: Sequence[Outcome], start: str) -> dict[str, str]:
    return {name.removeprefix(start): value for each in outcomes for name, value in each.noted.items() if name.startswith(start)}


def _losses(recorded: dict[str, str]) -> list[str]:
    """A row for each event, a column for each kind of connection: asked, failed, connections that ended unasked."""
    if not recorded:
        return []
    events = {event: json.loads(text) for event, text in recorded.items()}
    kinds = list(dict.fromkeys(kind for found in events.values() for kind in found["kinds"]))
    lines = [
        "",
        "Under load, on the second machine if not said otherwise: requests that failed of those asked meanwhile, and in brackets",
        "connections that ended in the midst of a request. A keep-alive connection that was closed at rest is no loss.",
        "",
        "| event | " + " | ".join(kinds) + " | s |",
        "|---|" + "---|" * len(kinds) + "---|",
    ]
    for event, found in events.items():
        cells = " | ".join(_cell(found["kinds"].get(kind)) for kind in kinds)
        lines.append(f"| {event} | {cells} | {found['seconds']:.0f} |")
    return lines


def _cell(counts: dict[str, int] | None) -> str:
    if counts is None:
        return "-"
    return f"{counts['failed']} of {counts['asked']}" + (f" ({counts['lost']})" if counts["lost"] else "")
