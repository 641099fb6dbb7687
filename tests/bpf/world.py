"""A node in miniature for the hooks: cgroups agent, proxy, workloads/{a,b}; a netns for each workload and one outside,
routed through the node's; a bpffs; the programs loaded by the loader; maps filled by hand."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.pace import PATIENCE, SLOW
from nodeagent import cgroups

ROOT = Path(__file__).resolve().parents[2]
# Of this pid namespace: a run in another one (a container's), whose cgroups we see, has pids that we do not
PREFIX = f"pillion-bpftest-{Path('/proc/self/ns/pid').stat().st_ino}-"
TAG = f"{PREFIX}{os.getpid()}"
SO_NETNS_COOKIE = 71
LEVEL, ORIGIN, CALLER = 0x50494C, 1, 2
OUTBOUND, HBONE, DNS = 15001, 15008, 15053
IDENTITY = {"a": 301, "b": 302}
WORKLOAD = {"a": 1001, "b": 1002}
HOSTS = {"a": 1, "b": 2, "out": 9}
V4 = {name: f"10.201.{number}.2" for name, number in HOSTS.items()}
V6 = {name: f"fd77:201:{number}::2" for name, number in HOSTS.items()}
SERVICE = 5000

_libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
_libc = ctypes.CDLL(None, use_errno=True)


def cgroup_root() -> Path:
    """Where cgroup2 is mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.split()[0] == "cgroup2":
            return Path(left.split()[4])
    raise AssertionError("no cgroup2 mount")


def run(*argv: str) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 5.0 * PATIENCE / SLOW) -> Any:
    """The condition's first true value."""
    end = time.monotonic() + seconds * SLOW
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s: {what}")


def addr(text: str) -> bytes:
    """struct pl_addr"""
    return socket.inet_pton(socket.AF_INET6, text if ":" in text else f"::ffff:{text}")


def text(raw: bytes) -> str:
    """The address in a struct pl_addr."""
    if raw[:12] == bytes(10) + b"\xff\xff":
        return socket.inet_ntoa(raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)


def sweep() -> None:
    """Remove what runs that were killed have left. Their actors ended with them; programs end with their cgroup."""
    for path in cgroup_root().glob(f"{PREFIX}*"):
        number = path.name.removeprefix(PREFIX)
        if Path(f"/proc/{number}").exists():
            continue
        for name in Path("/run/netns").glob(f"{path.name}-*"):
            subprocess.run(["ip", "netns", "del", name.name], capture_output=True, check=False)
        (path / "cgroup.kill").write_text("1")
        wait_for(lambda path=path: "populated 0" in (path / "cgroup.events").read_text(), f"{path} is empty")  # type: ignore[misc]  # bound now
        remove_cgroup(path)
        for folder in Path(tempfile.gettempdir()).glob(f"{path.name}-*"):
            _libc.umount2(os.fsencode(folder / "bpf"), 2)
            shutil.rmtree(folder, ignore_errors=True)


def remove_cgroup(top: Path) -> None:
    """With all below it; no process may be left in it."""
    for path in sorted((p for p in top.rglob("*") if p.is_dir()), reverse=True):
        path.rmdir()
    top.rmdir()


class Actor:
    """A process somewhere; call it with code, get the value or the exception."""

    def __init__(self, cgroup: Path | None, netns: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        place = f"/run/netns/{netns}" if netns else ""
        argv = [sys.executable, str(Path(__file__).with_name("actor.py")), str(cgroup or ""), place, str(theirs.fileno())]
        self.process = subprocess.Popen(argv, pass_fds=[theirs.fileno()])
        theirs.close()
        self.control = ours
        self.control.settimeout(20 * PATIENCE)

    def __call__(self, code: str) -> Any:
        return self._ask(code, "", [])

    def give(self, name: str, sock: socket.socket) -> None:
        """Pass a socket (SCM_RIGHTS)."""
        self._ask("", name, [sock.fileno()])

    def _ask(self, code: str, name: str, fds: list[int]) -> Any:
        socket.send_fds(self.control, [pickle.dumps((code, name))], fds)
        data, got, _, _ = socket.recv_fds(self.control, 1 << 18, 1)
        good, value = pickle.loads(data)
        if not good:
            raise value
        return socket.socket(fileno=got[0]) if got else value

    def close(self) -> None:
        self.control.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Map:
    """A pinned map, by field names."""

    def __init__(self, path: Path, layout: dict[str, Any]) -> None:
        self.fd = _libbpf.bpf_obj_get(os.fsencode(path))
        assert self.fd > 0, path
        self.key: dict[str, Any] = layout.get("key", {})
        self.leaf: dict[str, Any] = layout.get("leaf", {})

    def _pack(self, layout: dict[str, Any], values: dict[str, Any]) -> bytes:
        names = [field[0] for field in layout["fields"]]
        assert set(values) <= set(names), (values, names)
        blank = dict(zip(names, struct.unpack(layout["format"], bytes(layout["size"])), strict=True))
        return struct.pack(layout["format"], *(blank | values).values())

    def put(self, key: dict[str, Any], leaf: dict[str, Any]) -> None:
        result = _libbpf.bpf_map_update_elem(self.fd, self._pack(self.key, key), self._pack(self.leaf, leaf), 0)
        assert result == 0, os.strerror(-result)

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        value = ctypes.create_string_buffer(self.leaf["size"])
        if _libbpf.bpf_map_lookup_elem(self.fd, self._pack(self.key, key), value):
            return None
        return dict(zip((field[0] for field in self.leaf["fields"]), struct.unpack(self.leaf["format"], value.raw), strict=True))

    def delete(self, key: dict[str, Any]) -> bool:
        return bool(_libbpf.bpf_map_delete_elem(self.fd, self._pack(self.key, key)) == 0)

    def keys(self) -> list[bytes]:
        out: list[bytes] = []
        following = ctypes.create_string_buffer(self.key["size"])
        while _libbpf.bpf_map_get_next_key(self.fd, out[-1] if out else None, following) == 0:
            out.append(following.raw)
        return out

    def clear(self) -> None:
        for key in self.keys():
            _libbpf.bpf_map_delete_elem(self.fd, key)


class World:
    """Everything, made by `up` and gone after `down`."""

    def __init__(self, tmp: Path) -> None:
        self.tmp, self.fs, self.layouts_path = tmp, tmp / "bpf", tmp / "layouts.json"
        self.top = cgroup_root() / TAG
        self.cgroup = self.top / "n1"
        self.actors: list[Actor] = []
        self.netns = {name: f"{TAG}-{name}" for name in ("node", *HOSTS)}

    # ---- up and down

    def up(self) -> None:
        sweep()
        for path in ("agent", "proxy", "workloads/a", "workloads/b"):
            (self.cgroup / path).mkdir(parents=True)
        self.fs.mkdir()
        assert _libc.mount(b"bpf", os.fsencode(self.fs), b"bpf", 0, b"mode=0700") == 0
        node = self.netns["node"]
        run("ip", "netns", "add", node)
        run("ip", "netns", "exec", node, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        run("ip", "-n", node, "link", "set", "lo", "up")
        for name, number in HOSTS.items():
            place, host = self.netns[name], f"h{number}"
            run("ip", "netns", "add", place)
            run("ip", "-n", place, "link", "set", "lo", "up")
            run("ip", "-n", node, "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", place)
            for where, device, last in ((node, host, 1), (place, "eth0", 2)):
                run("ip", "-n", where, "link", "set", device, "up")
                run("ip", "-n", where, "addr", "add", f"10.201.{number}.{last}/24", "dev", device)
                run("ip", "-n", where, "addr", "add", f"fd77:201:{number}::{last}/64", "dev", device, "nodad")
            run("ip", "-n", place, "route", "add", "default", "via", f"10.201.{number}.1")
            run("ip", "-n", place, "route", "add", "default", "via", f"fd77:201:{number}::1")
        # Older than the programs: what no hook saw being made
        self.old = self.actor("workloads/a", "a")
        self.old("raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)")
        self.old("lite = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 136); early = socket.socket(); own = socket.socket()")
        self.out_old = self.actor(None, "out")
        self.out_old(f"l = socket.create_server(({V4['out']!r}, 7000))")
        self.old(f"live = socket.create_connection(({V4['out']!r}, 7000), 3)")
        self.out_old("c, _ = l.accept()")
        self.load()
        self.layouts = json.loads(self.layouts_path.read_text())
        self.maps = {name: Map(self.fs / "maps" / name, layout) for name, layout in self.layouts["maps"].items()}
        self.a, self.b = self.actor("workloads/a", "a"), self.actor("workloads/b", "b")
        self.agent = {name: self.actor("agent", name) for name in ("a", "b")}
        self.proxy = self.actor("proxy", "node")
        self.out = self.actor(None, "out")
        with socket.socket() as probe:
            assert probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
        self.cookie = {name: self._cookie(self.agent[name]) for name in ("a", "b")}
        self.reset()

    def down(self) -> None:
        for actor in self.actors:
            actor.close()
        self.loader("--unload")
        _libc.umount2(os.fsencode(self.fs), 2)
        for name in self.netns.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        if self.top.exists():
            wait_for(lambda: "populated 0" in (self.top / "cgroup.events").read_text(), "every actor is gone")
            remove_cgroup(self.top)
        shutil.rmtree(self.tmp, ignore_errors=True)

    def actor(self, cgroup: str | None, netns: str) -> Actor:
        actor = Actor(self.cgroup / cgroup if cgroup else None, self.netns[netns])
        self.actors.append(actor)
        actor("os.getpid()")
        return actor

    @staticmethod
    def _cookie(actor: Actor) -> int:
        return int(actor(f"int.from_bytes(socket.socket().getsockopt(socket.SOL_SOCKET, {SO_NETNS_COOKIE}, 8), 'little')"))

    def loader(self, *more: str) -> subprocess.CompletedProcess[str]:
        """One run of the loader."""
        argv = [sys.executable, "-m", "nodeagent.loader", "--bpf-dir", str(self.fs), *more]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60 * SLOW, check=False)

    def load(self, src: Path = ROOT / "bpf") -> subprocess.CompletedProcess[str]:
        done = self.loader("--cgroup", str(self.cgroup), "--src", str(src), "--layouts", str(self.layouts_path))
        if src == ROOT / "bpf":
            assert done.returncode == 0, done.stderr
        return done

    # ---- maps

    def reset(self) -> None:
        """Nothing open, nothing allowed, everybody known."""
        for actor in (self.a, self.b, self.proxy, self.out, *self.agent.values()):
            actor("tidy()")
        for name in ("dests", "backends", "policy", "egress", "dials", "sources", "members", "listeners"):
            self.maps[name].clear()
        levels = cgroups.level(self.cgroup)
        self.config = {
            "schema": self.layouts["schema"],
            "generation": 1,
            "level_lo": levels + 1,
            "level_hi": levels + 2,
            "host_netns": 0,
        }
        self.configure()
        self.member("agent", role="AGENT")
        self.member("proxy", role="PROXY")
        for name in ("a", "b"):
            self.member(
                f"workloads/{name}", role="WORKLOAD", workload=WORKLOAD[name], identity=IDENTITY[name], netns=self.cookie[name]
            )

    def configure(self, **values: int) -> None:
        self.config |= values
        self.maps["config"].put({"value": 0}, self.config)

    def bump(self) -> None:
        """A new generation."""
        self.configure(generation=self.config["generation"] + 1)

    def member(self, path: str, role: str, **values: int) -> None:
        number = self.layouts["constants"][f"PL_ROLE_{role}"]
        self.maps["members"].put({"value": (self.cgroup / path).stat().st_ino}, {"role": number, **values})

    def permissive(self, name: str) -> None:
        flag = self.layouts["constants"]["PL_MEMBER_PERMISSIVE"]
        values = {"workload": WORKLOAD[name], "identity": IDENTITY[name], "netns": self.cookie[name], "flags": flag}
        self.member(f"workloads/{name}", role="WORKLOAD", **values)

    def allow(self, destination: str, source: int, port: int, proto: int = 6, verdict: str = "ALLOW", rule: int = 7) -> None:
        key = {"workload": WORKLOAD[destination], "identity": source, "port": port, "proto": proto}
        self.maps["policy"].put(key, {"verdict": self.layouts["constants"][f"PL_{verdict}"], "rule": rule})

    def forbid(self, destination: str, source: int, port: int, proto: int = 6) -> None:
        self.maps["policy"].delete({"workload": WORKLOAD[destination], "identity": source, "port": port, "proto": proto})

    def dest(self, address: str, port: int, kind: str, proto: int = 6, **values: int) -> None:
        number = self.layouts["constants"][f"PL_DEST_{kind}"]
        self.maps["dests"].put(
            {"addr": addr(address), "port": port, "proto": proto}, {"kind": number, "service": SERVICE, **values}
        )

    def native(
        self, address: str, port: int, backends: list[tuple[str, int]], name: str = "b", proto: int = 6, service: int = SERVICE
    ) -> None:
        for slot, (backend, target) in enumerate(backends):
            key = {"service": service, "port": port, "slot": slot}
            self.maps["backends"].put(key, {"addr": addr(backend), "port": target, "workload": WORKLOAD[name]})
        self.dest(address, port, "NATIVE", proto, backends=len(backends), service=service)

    def egress(self, cidr: str, allow: int = 1, ports: tuple[int, ...] = ()) -> None:
        address, _, length = cidr.partition("/")
        prefix = int(length) + (0 if ":" in address else 96)
        packed = struct.pack("<8H", *ports, *(0,) * (8 - len(ports)))
        self.maps["egress"].put(
            {"prefixlen": prefix, "addr": addr(address)}, {"allow": allow, "nports": len(ports), "ports": packed}
        )

    def dial(self, name: str, address: str, port: int) -> None:
        self.maps["dials"].put({"netns": self.cookie[name], "addr": addr(address), "port": port}, {"value": 1})

    def listeners(self, name: str) -> None:
        self.maps["listeners"].put({"value": self.cookie[name]}, {"value": 1})

    def count(self, reason: str) -> int:
        """A counter's sum over CPUs."""
        possible = os.sysconf("SC_NPROCESSORS_CONF")
        value = ctypes.create_string_buffer(8 * max(possible, 256))
        key = struct.pack("<I", self.layouts["reasons"].index(reason))
        assert _libbpf.bpf_map_lookup_elem(self.maps["counters"].fd, key, value) == 0
        return sum(struct.unpack("<256Q", value.raw[: 8 * 256]))

    def origin(self, raw: bytes) -> dict[str, Any]:
        """struct pl_origin"""
        layout = self.layouts["structs"]["pl_origin"]
        return dict(zip((field[0] for field in layout["fields"]), struct.unpack(layout["format"], raw), strict=True))

    def caller(self, address: str, port: int, identity: int) -> bytes:
        """struct pl_caller"""
        return struct.pack(self.layouts["structs"]["pl_caller"]["format"], addr(address), identity, port, 0)
