"""What /proc and the file system say of a node's processes, read from outside: nothing is changed, nobody is asked.

``proc`` is /proc, or a test's copy of one. What cannot be read is None: whoever judges must be able to say "could not tell".
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pyroute2 import NetNS
from pyroute2.netlink.exceptions import NetlinkError

PROC = Path("/proc")
CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
BPFFS_MAGIC = 0xCAFE4A11
# Who reaches one of these may have a program started elsewhere, the first answers root alone; or names resolved past the mesh's
# DNS. As pillion/drop_in.py hides them
RESOLVERS = ("/run/systemd/resolve/io.systemd.Resolve", "/run/nscd/socket", "/run/avahi-daemon/socket")
MANAGERS = ("/run/systemd/private", "/run/dbus/system_bus_socket", *RESOLVERS)
PROCESSES_MAX = 4096  # of one workload that are looked at
_LINK_INFO_BYTES = 64
CABLE_FILTER = "pillion-veth"  # nodeagent/tc.py attaches it to the host's side of each pod's cable
_CLSACT_INGRESS = 0xFFFFFFF2
_CGROUP_ID_AT = 16  # struct bpf_link_info: type, id, prog_id, padding, then cgroup_id


@dataclass(frozen=True)
class Process:
    """One process."""

    pid: int
    uid: int  # effective
    capabilities: dict[str, int]
    no_new_privileges: bool
    seccomp: int  # 2: a filter
    dumpable: bool | None
    cgroup: str  # below the cgroup2 mount
    interfaces: tuple[str, ...] | None  # of its network namespace
    user_namespace: str | None
    cgroup_writable: bool | None  # it sees a cgroup2 mounted read-write
    managers: tuple[str, ...] = ()  # of MANAGERS, those of this host that it sees and that would answer it


@dataclass(frozen=True)
class Mode:
    """Of a file."""

    path: str
    uid: int
    mode: int
    kind: str  # directory, socket, file
    bpffs: bool = False


@dataclass(frozen=True)
class Facts:
    """Of one node, beside what its agent says."""

    agent: Process | None
    proxies: dict[int, Process | None]  # by pid, as the agent names them; main processes too
    workloads: dict[str, list[Process] | None]  # namespace/name -> its processes
    cgroups: dict[str, Mode | None]  # of workloads
    files: dict[str, Mode | None]  # what -> path and mode
    links: dict[str, bool | None] = field(default_factory=dict)  # pinned link -> attached to this node's cgroup
    sysctls: dict[str, str | None] = field(default_factory=dict)
    cables: dict[str, bool | None] = field(default_factory=dict)  # pod -> the filter is on its cable; False too without a cable


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def process(pid: int, proc: Path = PROC) -> Process | None:
    """None: there is none any more, or it may not be read."""
    base = proc / str(pid)
    status = _text(base / "status")
    if status is None:
        return None
    fields = {name: value.strip() for name, _, value in (line.partition(":") for line in status.splitlines())}
    try:
        uid = int(fields["Uid"].split()[1])
        capabilities = {name: int(fields[name], 16) for name in CAPABILITY_SETS}
        seccomp, no_new = int(fields["Seccomp"]), fields["NoNewPrivs"] == "1"
    except (KeyError, ValueError, IndexError):
        return None
    lines = (_text(base / "cgroup") or "").splitlines()
    group = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "")
    return Process(
        pid, uid, capabilities, no_new, seccomp, _dumpable(base, uid), group, _interfaces(base), _link(base / "ns/user"),
        _cgroup_writable(base), _managers(base, uid),
    )  # fmt: skip


def _dumpable(base: Path, uid: int) -> bool | None:
    """The files of a process that may not be dumped belong to root, whoever it runs as."""
    try:
        owner = (base / "environ").stat().st_uid
    except OSError:
        return None
    return None if uid == 0 else owner == uid


def _interfaces(base: Path) -> tuple[str, ...] | None:
    text = _text(base / "net/dev")
    return None if text is None else tuple(line.split(":")[0].strip() for line in text.splitlines()[2:] if ":" in line)


def _link(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _cgroup_writable(base: Path) -> bool | None:
    """By the mount's own options and those of the file system."""
    text = _text(base / "mountinfo")
    if text is None:
        return None
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, rest = after.partition(" ")
        if kind == "cgroup2" and "rw" in before.split()[5].split(",") and "rw" in rest.split()[-1].split(","):
            return True
    return False


def _managers(base: Path, uid: int) -> tuple[str, ...]:
    """Not what another mount lies over, and not another host's, a container's say."""
    found = []
    for path in MANAGERS if uid == 0 else MANAGERS[1:]:
        try:
            own, seen = Path(path).stat(), (base / "root" / path.lstrip("/")).stat()
        except OSError:
            continue
        if (own.st_dev, own.st_ino) == (seen.st_dev, seen.st_ino):
            found.append(path)
    return tuple(found)


def cgroup_processes(path: Path) -> list[int] | None:
    """Of a cgroup and those below it."""
    found: list[int] = []
    if not path.is_dir():
        return None
    for directory, _, _ in os.walk(path):
        text = _text(Path(directory) / "cgroup.procs")
        found += [int(pid) for pid in (text or "").split()]
    return found[:PROCESSES_MAX]


def processes(pids: Iterable[int], proc: Path = PROC) -> list[Process]:
    """Those that are still there."""
    return [found for pid in pids if (found := process(pid, proc)) is not None]


def mode_of(path: Path, root: Path = Path("/")) -> Mode | None:
    """``root``: where its owner's file system begins; left out of what is shown."""
    try:
        found = path.lstat()
    except OSError:
        return None
    kind = "directory" if stat.S_ISDIR(found.st_mode) else "socket" if stat.S_ISSOCK(found.st_mode) else "file"
    shown = f"/{path.relative_to(root)}" if path.is_relative_to(root) else str(path)
    return Mode(shown, found.st_uid, stat.S_IMODE(found.st_mode), kind, kind == "directory" and _is_bpffs(path))


def _is_bpffs(path: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(256)  # struct statfs begins with f_type, a long
    if libc.statfs(os.fsencode(path), buffer):
        return False
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF == BPFFS_MAGIC


def arguments(pid: int, proc: Path = PROC) -> dict[str, str]:
    """The long options on a process's command line."""
    try:
        words = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    found: dict[str, str] = {}
    for number, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = value if equals else (words[number + 1] if number + 1 < len(words) else "")
    return found


def link_attached(pinned: Path, cgroup: int) -> bool | None:
    """Whether a pinned link is attached to the cgroup of this id: the kernel's own word. None: it could not be asked."""
    try:
        bpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        return None
    fd = bpf.bpf_obj_get(os.fsencode(pinned))
    if fd < 0:
        return None
    try:
        info, length = ctypes.create_string_buffer(_LINK_INFO_BYTES), ctypes.c_uint32(_LINK_INFO_BYTES)
        if bpf.bpf_obj_get_info_by_fd(fd, info, ctypes.byref(length)):
            return None
        return ctypes.c_uint64.from_buffer(info, _CGROUP_ID_AT).value == cgroup
    finally:
        os.close(fd)


def read_sysctl(name: str, proc: Path = PROC) -> str | None:
    text = _text(proc / "sys" / name.replace(".", "/"))
    return None if text is None else text.strip()


def filtered(interfaces: Iterable[str], pid: int, proc: Path = PROC) -> dict[str, bool | None]:
    """Whether the mesh's filter is on each interface of a process's network namespace: the kernel's own word. None: it could
    not be asked."""
    wanted = set(interfaces)
    out: dict[str, bool | None] = dict.fromkeys(wanted)
    if not wanted:
        return out
    try:
        with NetNS(str(proc / str(pid) / "ns/net"), flags=0) as route:
            for name in wanted:
                out[name] = any(
                    options is not None and options.get_attr("TCA_BPF_NAME") == CABLE_FILTER
                    for index in route.link_lookup(ifname=name)
                    for found in route.get_filters(index, parent=_CLSACT_INGRESS)
                    if found.get_attr("TCA_KIND") == "bpf"
                    for options in [found.get_attr("TCA_OPTIONS")]
                )
    except (NetlinkError, OSError):
        return dict.fromkeys(wanted)
    return out
