"""What became of this host's enrolled services, for `check --security`: a drop-in that somebody adds later may undo ours."""

from __future__ import annotations

from pathlib import Path

from pillion.drop_in import service_drop_in, slice_of, socket_drop_in
from pillion.enrol_files import read_workloads
from pillion.enrol_systemd import elsewhere, facts, sockets_of, undone
from pillion.errors import CliError
from pillion.findings import Finding, judged

SYSTEMD = Path("/run/systemd/system")


def enrolled() -> Finding:
    """By what systemd says of each, and of its sockets."""
    wrong: list[str] = []
    unknown: list[str] = []
    names: dict[str, str] = {}
    try:
        entries = read_workloads(needed=False) if SYSTEMD.is_dir() else []
        names = {str(entry["unit"]): f"{entry['namespace']}/{entry['name']}" for entry in entries if entry.get("unit")}
    except (CliError, KeyError, OSError) as error:
        unknown.append(str(error))
    for unit, workload in names.items():
        try:
            wrong += _wrong(unit, workload)
        except CliError as error:
            unknown.append(f"{unit}: {error.what}")
    return judged(
        "enrolled services",
        wrong,
        f"{len(names)}, as they were enrolled",
        "systemctl cat shows whose drop-in says otherwise; take that away, enrol the service again, and restart it",
        unknown,
    )


def _wrong(unit: str, workload: str) -> list[str]:
    known = facts(unit)
    if known.get("LoadState") != "loaded":
        return []  # it can not run
    found = []
    # The least: with D-Bus
    texts = {unit: service_drop_in(unit, workload, allow_dbus=True)}
    texts |= {each: socket_drop_in(unit, workload) for each in sockets_of(unit, known)}
    for each, text in texts.items():
        if group := elsewhere(each, slice_of(unit)):
            found.append(f"{each} runs in {group}, outside the mesh")
        if lines := undone(each, text):
            found.append(f"{each} is without {', '.join(lines)} of its enrolment")
    return found
