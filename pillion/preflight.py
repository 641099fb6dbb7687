"""check --pre: what this kernel and host can do for the mesh, feature by feature, before anything is installed.

Standard library only, so that it runs on a bare host: ``python3 pillion/preflight.py controller|node``. Each feature is tried,
on scratch cgroups and namespaces that are gone afterwards; no version is compared with anything.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

BPF, PIDFD_GETFD = 321, 438  # x86-64
MAP_CREATE, PROG_LOAD, LINK_CREATE = 0, 5, 28
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
SO_NETNS_COOKIE = 71
# hook: (program type, attach type), as nodeagent/loader/attach.py has them
HOOKS = {
    "egress": (8, 1), "ingress": (8, 0), "create": (9, 2), "release": (9, 34), "sockops": (13, 3), "bind4": (18, 8),
    "bind6": (18, 9), "connect4": (18, 10), "connect6": (18, 11), "sendmsg4": (18, 14), "sendmsg6": (18, 15),
    "recvmsg4": (18, 19), "recvmsg6": (18, 20), "getpeername4": (18, 29), "getpeername6": (18, 30), "getsockopt": (25, 21),
    "setsockopt": (25, 22),
}  # fmt: skip
MAPS = {"ring buffer": (27, 0, 0, 4096, 0), "longest prefix": (11, 20, 4, 16, 1), "per CPU": (6, 4, 8, 4, 0)}
SCHED_CLS, SK_SKB, SK_MSG = (3, 0), (14, 5), (16, 7)
SOCKHASH = (18, 8, 4, 16, 0)
STOP = "stop what listens there: ss -ltnp"
DISTRIBUTIONS = ("debian 12", "debian 13", "ubuntu 24.04")  # as install.sh has them
PORTS = {"node": (15001, 15008, 15053), "controller": (15443,)}
KERNEL = "use a distribution's kernel with CONFIG_CGROUP_BPF, such as Debian's or Ubuntu's"
CHILD_TIMEOUT_S = 20
COMPILE_TIMEOUT_S = 1800  # as the agent would wait: nodeagent/loading.py

_libc = ctypes.CDLL(None, use_errno=True)


class Seen(NamedTuple):
    """``needed`` is False where the mesh goes on without it, more slowly or without that kind of workload, and where
    install.sh has yet to bring it (``later``)."""

    ok: bool
    what: str
    remedy: str = ""
    needed: bool = True
    later: bool = False

    @property
    def state(self) -> str:
        return "ok" if self.ok else "later" if self.later else "MISSING" if self.needed else "off"


def _bpf(command: int, attributes: bytes) -> int:
    """A descriptor. Raises OSError."""
    buffer = ctypes.create_string_buffer(attributes.ljust(144, b"\0"), 144)
    result = int(_libc.syscall(BPF, command, buffer, 144))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def load(prog_type: int, attach_type: int) -> int:
    """A program that answers 1. Raises OSError."""
    code = ctypes.create_string_buffer(struct.pack("<BBhi", 0xB7, 0, 0, 1) + struct.pack("<BBhi", 0x95, 0, 0, 0))
    license = ctypes.create_string_buffer(b"GPL")
    head = struct.pack("<IIQQ", prog_type, 2, ctypes.addressof(code), ctypes.addressof(license))
    return _bpf(PROG_LOAD, head.ljust(68, b"\0") + struct.pack("<I", attach_type))


def make_map(kind: int, key: int, value: int, entries: int, flags: int) -> None:
    """Raises OSError."""
    os.close(_bpf(MAP_CREATE, struct.pack("<IIIII", kind, key, value, entries, flags)))


def mount_of_cgroup2() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == "cgroup2":
            return Path(before.split()[4])
    return None


@contextmanager
def scratch_cgroup() -> Iterator[Path]:
    mount = mount_of_cgroup2()
    if mount is None:
        raise OSError(errno.ENOENT, "no cgroup2")
    path = mount / f"pillion-check-{os.getpid()}"
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()


def apart(work: Callable[[], str], namespaces: int) -> str:
    """What ``work`` returns, in a child with new namespaces. Raises OSError with what it raised."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(CHILD_TIMEOUT_S)
            if _libc.unshare(namespaces):
                raise OSError(ctypes.get_errno(), "unshare")
            if namespaces & CLONE_NEWNS:
                _libc.mount(b"none", b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
            os.write(write, b"+" + work().encode())
        except BaseException as error:
            os.write(write, b"-" + (str(error) or type(error).__name__).encode()[:500])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    os.waitpid(child, 0)
    if not said.startswith("+"):
        raise OSError(errno.EIO, said[1:] or "no answer in time")
    return said[1:]


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False)
    if done.returncode:
        raise OSError(errno.EIO, f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


# ---- what is tried


def root() -> Seen:
    return Seen(os.geteuid() == 0, f"uid {os.geteuid()}")


def machine() -> Seen:
    return Seen(platform.machine() == "x86_64", platform.machine())


def distribution() -> Seen:
    told = dict(line.partition("=")[::2] for line in Path("/etc/os-release").read_text().splitlines())
    name = " ".join(told.get(key, "").strip("\"'") for key in ("ID", "VERSION_ID"))
    return Seen(name in DISTRIBUTIONS, name)


def python() -> Seen:
    return Seen(sys.version_info >= (3, 11), platform.python_version())


def manager() -> Seen:
    there = Path("/run/systemd/system").is_dir()
    return Seen(there, "systemd runs" if there else "not systemd")


def cgroup2() -> Seen:
    with scratch_cgroup() as path:
        kill = (path / "cgroup.kill").exists()
        return Seen(
            kill, f"{path.parent}{'' if kill else ', without cgroup.kill'}", "boot with systemd.unified_cgroup_hierarchy=1"
        )


def hooks() -> Seen:
    bad: dict[str, str] = {}
    with scratch_cgroup() as path:
        target = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name, (kind, attach) in HOOKS.items():
                try:
                    program = load(kind, attach)
                    try:
                        os.close(_bpf(LINK_CREATE, struct.pack("<IIII", program, target, attach, 0)))
                    finally:
                        os.close(program)
                except OSError as error:
                    bad[name] = error.strerror or str(error)
        finally:
            os.close(target)
    return Seen(not bad, "; ".join(f"{n}: {e}" for n, e in bad.items()) or f"{len(HOOKS)} kinds load and attach", KERNEL)


def maps() -> Seen:
    bad = {}
    for name, shape in MAPS.items():
        try:
            make_map(*shape)
        except OSError as error:
            bad[name] = error.strerror or str(error)
    return Seen(not bad, "; ".join(f"{n}: {e}" for n, e in bad.items()) or ", ".join(MAPS), KERNEL)


def bpffs() -> Seen:
    def work() -> str:
        with tempfile.TemporaryDirectory() as path:
            if _libc.mount(b"bpf", path.encode(), b"bpf", 0, b"mode=0700"):
                raise OSError(ctypes.get_errno(), "mount")
            _libc.umount2(path.encode(), 2)
        return "can be mounted"

    return Seen(True, apart(work, CLONE_NEWNS), "")


def exists(path: str) -> Seen:
    there = Path(path).exists()
    return Seen(there, path if there else f"no {path}")


def destroy() -> Seen:
    def work() -> str:
        run("ip", "link", "set", "lo", "up")
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            peer, _ = server.accept()
            run("ss", "-K", "dst", "127.0.0.1", "dport", "=", str(server.getsockname()[1]))
            client.settimeout(2.0)
            try:
                client.recv(1)
            except ConnectionAbortedError:
                return "a connection was ended from outside"
            except OSError as error:
                raise OSError(errno.EOPNOTSUPP, f"the connection lived on: {error}") from None
            finally:
                peer.close()
        raise OSError(errno.EOPNOTSUPP, "the connection was not reset")

    return Seen(True, apart(work, CLONE_NEWNET))


def pods() -> Seen:
    def work() -> str:
        run("ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
        run("tc", "qdisc", "add", "dev", "veth0", "clsact")
        os.close(load(*SCHED_CLS))
        return "veth, clsact, classifier"

    return Seen(True, apart(work, CLONE_NEWNET), needed=False)


def express() -> Seen:
    make_map(*SOCKHASH)
    os.close(load(*SK_SKB))
    os.close(load(*SK_MSG))
    return Seen(True, "sockhash, sk_msg and sk_skb load", needed=False)


def cookies() -> Seen:
    with socket.socket() as probe:
        probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    return Seen(True, "namespaces have cookies")


def takeover() -> Seen:
    with socket.socket() as probe:
        pidfd = os.pidfd_open(os.getpid())
        try:
            fd = int(_libc.syscall(PIDFD_GETFD, pidfd, probe.fileno(), 0))
        finally:
            os.close(pidfd)
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        os.close(fd)
    return Seen(True, "pidfd_getfd")


def seccomp() -> Seen:
    status = Path("/proc/self/status").read_text()
    return Seen("Seccomp_filters:" in status or "Seccomp:" in status, "filters")


def compiler() -> Seen:
    done = subprocess.run(["/usr/bin/python3", "-c", "import bcc"], capture_output=True, text=True, timeout=60, check=False)
    said = "the module bcc loads" if not done.returncode else (done.stderr.strip().splitlines() or ["it does not load"])[-1]
    return Seen(not done.returncode, said)


def library() -> Seen:
    ctypes.CDLL("libbpf.so.1")
    return Seen(True, "libbpf.so.1")


def programs() -> Seen:
    """The mesh's own programs, through its loader, on a cgroup nobody is in."""
    project = Path(__file__).resolve().parent.parent

    def work() -> str:
        with scratch_cgroup() as cgroup, tempfile.TemporaryDirectory() as scratch:
            pins = Path(scratch) / "bpf"
            pins.mkdir()
            if _libc.mount(b"bpf", os.fsencode(pins), b"bpf", 0, b"mode=0700"):
                raise OSError(ctypes.get_errno(), "mount bpffs")
            try:
                signal.alarm(COMPILE_TIMEOUT_S + 10)
                where = ("--cgroup", str(cgroup), "--bpf-dir", str(pins), "--src", str(project / "bpf"))
                os.environ["PYTHONPATH"] = str(project)
                done = subprocess.run(
                    ["/usr/bin/python3", "-m", "nodeagent.loader", *where, "--layouts", f"{scratch}/layouts.json"],
                    capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False, cwd=project,
                )  # fmt: skip
                if done.returncode:
                    raise OSError(errno.EINVAL, (done.stderr.strip().splitlines() or ["?"])[-1][:300])
            finally:
                shutil.rmtree(pins / "links", ignore_errors=True)
                _libc.umount2(os.fsencode(pins), 2)
        return "all compile, pass the verifier and attach"

    return Seen(True, apart(work, CLONE_NEWNS))


def ports(role: str) -> Seen:
    taken = []
    for port in PORTS[role]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))  # as the mesh itself would, then gone
            except OSError:
                taken.append(port)
    mine = bool(taken) and (INSTALLED / role).exists()
    said = f"{taken} {'in use by the mesh' if mine else 'taken'}" if taken else "free: " + ", ".join(map(str, PORTS[role]))
    return Seen(not taken or mine, said, STOP)


Check = Callable[[], Seen]
COMMON: dict[str, tuple[Check, str]] = {
    "root": (root, "run it as root: sudo"),
    "machine": (machine, "use an x86-64 host: the proxy's system call filter is for that"),
    "distribution": (distribution, "install.sh knows " + ", ".join(DISTRIBUTIONS) + "; elsewhere use the lab"),
    "python": (python, "use a distribution with Python 3.11 or newer"),
    "systemd": (manager, "install where systemd runs; elsewhere use the lab"),
}
NODE: dict[str, tuple[Check, str]] = {
    "cgroup2": (cgroup2, "mount it, or boot with systemd.unified_cgroup_hierarchy=1"),
    "hooks": (hooks, KERNEL),
    "maps": (maps, KERNEL),
    "bpffs": (bpffs, "use a kernel with CONFIG_BPF_SYSCALL, and leave mount() to root"),
    "btf": (lambda: exists("/sys/kernel/btf/vmlinux"), "without it every request goes through the proxy: CONFIG_DEBUG_INFO_BTF"),
    "ending connections": (destroy, "without it what is denied falls silent and times out: CONFIG_INET_DIAG_DESTROY; iproute2"),
    "namespace cookies": (cookies, KERNEL),
    "listeners' takeover": (takeover, "allow pidfd_getfd: a container's or security module's policy refuses it"),
    "seccomp": (seccomp, "use a kernel with CONFIG_SECCOMP_FILTER"),
    "bcc": (compiler, "apt install python3-bpfcc; deploy/install.sh does"),
    "libbpf": (library, "apt install libbpf1; deploy/install.sh does"),
    "headers": (lambda: exists("/usr/include/linux/types.h"), "apt install linux-libc-dev; deploy/install.sh does"),
    "programs": (programs, "see the message"),
    "pods (veth, tc)": (pods, "only workloads with a namespace of their own need it: modprobe sch_ingress cls_bpf veth"),
    "express (sockmap)": (express, "without it every request goes through the proxy: CONFIG_BPF_STREAM_PARSER"),
}
# As nodeagent/optional.py goes on without; the kernel's types (btf) are for express
OPTIONAL = ("pods (veth, tc)", "express (sockmap)", "btf", "ending connections")
BROUGHT = ("bcc", "libbpf", "headers")  # by install.sh, and "programs" need all of them
INSTALLED = Path("/opt/pillion/installed")


def examine(role: str) -> dict[str, Seen]:
    """By feature, for ``node`` or ``controller``. Nothing raises, nothing stays."""
    checks = COMMON | (NODE if role == "node" else {}) | {"ports": (lambda: ports(role), STOP)}
    found: dict[str, Seen] = {}
    for name, (check, remedy) in checks.items():
        if name == "programs" and any(found[each].later for each in BROUGHT):
            found[name] = Seen(False, "tried when all that is there", needed=False, later=True)
            continue
        try:
            seen = check()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            seen = Seen(False, getattr(error, "strerror", None) or str(error), remedy)
        if not seen.ok and name in BROUGHT and not (INSTALLED / role).exists():
            found[name] = Seen(False, f"install.sh brings it ({seen.what})", needed=False, later=True)
        else:
            found[name] = seen._replace(needed=name not in OPTIONAL, remedy="" if seen.ok else seen.remedy or remedy)
    return found


def main() -> int:
    """0: all that is needed is there. 1: something is missing. 2: used wrongly."""
    role = sys.argv[1] if len(sys.argv) == 2 else "node"
    if role not in PORTS:
        print("usage: preflight.py controller|node", file=sys.stderr)
        return 2
    found = examine(role)
    width = max(map(len, found))
    for name, seen in found.items():
        print(f"{name:<{width}}  {seen.state:<7}  {seen.what}")
        if seen.remedy:
            print(f"{'':<{width}}           -> {seen.remedy}")
    return int(any(seen.needed and not seen.ok for seen in found.values()))


if __name__ == "__main__":
    sys.exit(main())
