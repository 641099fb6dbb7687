"""Which workloads this node shall run: a static YAML file that is watched, and those added over the local API.

Parsing is pure and all or nothing: one bad entry refuses the file, and the agent goes on with the list it had.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Any

import msgspec
import yaml

from nodeagent.files import Damaged, read_json, write_atomically

FILE_BYTES_MAX = 4 << 20
WORKLOADS_MAX = 4096
LABELS_MAX = 64
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where the wheel has it
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
_DOTTED = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}\Z")


class WorkloadsError(ValueError):
    """The operator's input is wrong: where, what, and what to do."""


class Spec(msgspec.Struct, frozen=True):
    """A workload as the node's operator described it."""

    name: str
    namespace: str
    service_account: str
    cgroup: str  # absolute path
    addresses: tuple[str, ...]  # canonical text, at most one per family
    labels: dict[str, str] = {}
    netns: str | None = None  # path; None: the node's own
    veth: str | None = None  # host side, to be guarded
    ports: tuple[int, ...] = ()  # told by `pillion run`, shown in the status
    source: str = "file"  # file | api

    @property
    def key(self) -> str:
        return f"Workload/{self.namespace}/{self.name}"


def _name(where: str, field: str, value: object, pattern: re.Pattern[str] = _LABEL) -> str:
    if not isinstance(value, str) or not pattern.match(value):
        raise WorkloadsError(f"{where}: {field} is {value!r}; give lower-case letters, digits and '-'")
    return value


def _addresses(where: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise WorkloadsError(f"{where}: addresses must be a list of one or two addresses")
    found: dict[int, str] = {}
    for text in value:
        try:
            address = ipaddress.ip_address(text) if isinstance(text, str) else None
        except ValueError:
            address = None
        if address is None or address.is_unspecified or address.is_multicast or address.is_loopback:
            raise WorkloadsError(f"{where}: {text!r} is not an address a workload can have")
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            raise WorkloadsError(f"{where}: write {text} as IPv4")
        if address.version in found:
            raise WorkloadsError(f"{where}: two IPv{address.version} addresses; one per family")
        found[address.version] = str(address)
    return tuple(found[version] for version in sorted(found))


def _path(where: str, field: str, value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value or ".." in Path(value).parts:
        raise WorkloadsError(f"{where}: {field} is {value!r}; give an absolute path")
    return str(Path(value))


def _labels(where: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > LABELS_MAX:
        raise WorkloadsError(f"{where}: labels must be a mapping of at most {LABELS_MAX} entries")
    if not all(isinstance(k, str) and isinstance(v, str) and len(k) <= 317 and len(v) <= 63 for k, v in value.items()):
        raise WorkloadsError(f"{where}: every label is text (quote numbers and yes/no), a value has at most 63 characters")
    return dict(value)


def check(entry: object, where: str, *, node_addresses: tuple[str, ...], ancestor: str, source: str = "file") -> Spec:
    """One entry, as in the file (camel case) or the API (snake case). Raises WorkloadsError."""
    if not isinstance(entry, dict):
        raise WorkloadsError(f"{where}: a workload is a mapping with name, namespace, serviceAccount, cgroup")
    known = {"name", "namespace", "serviceAccount", "service_account", "labels", "addresses", "netns", "cgroup", "veth", "ports"}
    known |= {"unit"}  # whose it is, for `pillion withdraw`
    unknown = sorted(str(key) for key in entry if key not in known)
    if unknown:
        raise WorkloadsError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(sorted(known - {'service_account'}))}")
    netns = _path(where, "netns", entry["netns"]) if entry.get("netns") is not None else None
    veth = entry.get("veth")
    if veth is not None and (not isinstance(veth, str) or not _INTERFACE.match(veth)):
        raise WorkloadsError(f"{where}: veth is {veth!r}; give the name of the interface on the host's side")
    addresses = _addresses(where, entry["addresses"]) if entry.get("addresses") else ()
    if not addresses:
        if netns is not None:
            raise WorkloadsError(f"{where}: a workload with a netns of its own needs addresses")
        addresses = node_addresses
    cgroup = _path(where, "cgroup", entry.get("cgroup"))
    if not cgroup.startswith(ancestor.rstrip("/") + "/"):
        raise WorkloadsError(f"{where}: cgroup {cgroup} is not below {ancestor}, where the mesh's programs are attached")
    ports = entry.get("ports") or ()
    if not isinstance(ports, (list, tuple)) or not all(isinstance(port, int) and 0 < port < 65536 for port in ports):
        raise WorkloadsError(f"{where}: ports must be a list of numbers from 1 to 65535")
    return Spec(
        name=_name(where, "name", entry.get("name")),
        namespace=_name(where, "namespace", entry.get("namespace")),
        service_account=_name(where, "serviceAccount", entry.get("serviceAccount", entry.get("service_account")), _DOTTED),
        cgroup=cgroup,
        addresses=addresses,
        labels=_labels(where, entry.get("labels") or {}),
        netns=netns,
        veth=veth,
        ports=tuple(ports),
        source=source,
    )


def check_together(specs: dict[str, Spec]) -> None:
    """What only shows between entries: cgroups inside each other, addresses used in two netns. Raises WorkloadsError."""
    if len(specs) > WORKLOADS_MAX:
        raise WorkloadsError(f"{len(specs)} workloads; a node takes {WORKLOADS_MAX}")
    cgroups = {spec.cgroup: spec for spec in specs.values()}
    if len(cgroups) < len(specs):
        raise WorkloadsError("two workloads name the same cgroup; each needs its own")
    owners: dict[str, Spec] = {}
    for spec in specs.values():
        for parent in Path(spec.cgroup).parents:
            if str(parent) in cgroups:
                outer = cgroups[str(parent)]
                raise WorkloadsError(f"{spec.key}: its cgroup is inside that of {outer.key}; move it beside")
        for address in spec.addresses:
            other = owners.setdefault(address, spec)
            if other.netns != spec.netns:
                raise WorkloadsError(f"{spec.key}: {address} belongs to {other.key} in another netns")


def parse(text: str, *, node_addresses: tuple[str, ...], ancestor: str) -> dict[str, Spec]:
    """The whole file -> key -> Spec. Raises WorkloadsError."""
    try:
        document: Any = yaml.load(text, Loader=_Loader)  # noqa: S506  # one of the safe ones
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise WorkloadsError(f"not YAML: {' '.join(str(error).split())}") from error
    if document is None:
        return {}
    entries = document.get("workloads") if isinstance(document, dict) else None
    if not isinstance(document, dict) or set(document) - {"workloads"} or not isinstance(entries, (list, type(None))):
        raise WorkloadsError("the file holds one mapping with one list: workloads")
    specs: dict[str, Spec] = {}
    for index, entry in enumerate(entries or []):
        spec = check(entry, f"workloads[{index}]", node_addresses=node_addresses, ancestor=ancestor)
        if spec.key in specs:
            raise WorkloadsError(f"workloads[{index}]: {spec.namespace}/{spec.name} is listed twice")
        specs[spec.key] = spec
    check_together(specs)
    return specs


def _mark(path: Path) -> object:
    """Another whenever the file, or what keeps it from being looked at, is another."""
    try:
        stat = path.stat()
    except OSError as error:
        return error.errno
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


class WorkloadFile:
    """The watched file. `changed` is one stat and is asked often: works on every file system and with renames."""

    def __init__(self, path: Path | None, *, node_addresses: tuple[str, ...], ancestor: str) -> None:
        self._path, self._addresses, self._ancestor = path, node_addresses, ancestor
        self._seen: object = ()
        self.specs: dict[str, Spec] = {}
        self.error = ""  # why the newest content was refused; the specs are then the former ones
        self.refused = 0
        self.loaded = path is None  # whether any content was ever taken

    def changed(self) -> bool:
        """Whether there is something new to `poll`."""
        return self._path is not None and _mark(self._path) != self._seen

    def poll(self) -> bool:
        """Whether `specs` or `error` changed. A long file takes a while: call it in a thread. Never raises: a bad or unreadable
        file is told in `error`."""
        if self._path is None or (mark := _mark(self._path)) == self._seen:
            return False
        self._seen = mark
        before = self.specs, self.error
        try:
            with self._path.open("rb") as file:
                data = file.read(FILE_BYTES_MAX + 1)
            if len(data) > FILE_BYTES_MAX:
                raise WorkloadsError(f"larger than {FILE_BYTES_MAX} bytes")
            self.specs = parse(data.decode(), node_addresses=self._addresses, ancestor=self._ancestor)
            self.error, self.loaded = "", True
        except FileNotFoundError:
            self.error = f"{self._path}: absent; the former {len(self.specs)} workloads stay" if self.specs else ""
        except (OSError, UnicodeDecodeError, WorkloadsError) as error:
            self.error = f"{self._path}: {error}"
            self.refused += 1
        return (self.specs, self.error) != before


class Book:
    """What must outlive an agent: workloads of the API, those of the last good file, and every key registered at the
    controller (so that one removed from the file while the agent was down is unregistered)."""

    class _Content(msgspec.Struct):
        api: dict[str, Spec] = {}
        file: dict[str, Spec] = {}
        registered: list[str] = []

    def __init__(self, directory: Path) -> None:
        self._path = directory / "workloads.json"
        self.api: dict[str, Spec] = {}
        self.file: dict[str, Spec] = {}  # the last good content of the file
        self.registered: set[str] = set()
        self.error = ""

    def load(self) -> None:
        """A damaged book is an empty one, told in `error`: its workloads are then unknown, so denied."""
        try:
            content = read_json(self._path, self._Content)
        except FileNotFoundError:
            return
        except Damaged as error:
            self.error = str(error)
            return
        self.api, self.file, self.registered = content.api, content.file, set(content.registered)

    def save(self) -> None:
        """Raises OSError."""
        content = self._Content(api=self.api, file=self.file, registered=sorted(self.registered))
        write_atomically(self._path, msgspec.json.encode(content))
