"""Code run as the proxy runs, with its confinement and a descriptor of its kind, tries to get out. Needs root."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from l7proxy import seccomp
from l7proxy.confine import DEFAULT_UID, ConfineError, user_ids
from lab.pace import PATIENCE
from mesh import link

ROOT = Path(__file__).parents[2]

CHILD = textwrap.dedent(
    """
    import ctypes, errno, json, os, socket, ssl, sys
    import uvloop, asyncio
    from l7proxy import scheduling
    from l7proxy.confine import confine, status
    from l7proxy.seccomp import NUMBERS

    handed = socket.create_server(("127.0.0.1", 0))  # as the agent hands over: made before, outside
    inside, outside = socket.socketpair()
    key = os.memfd_create("key")
    os.write(key, open(sys.argv[1]).read().encode())
    confine(65471, 65471)
    out = {"status": status()}
    libc = ctypes.CDLL(None, use_errno=True)

    def raw(name, *arguments):
        ctypes.set_errno(0)
        result = libc.syscall(NUMBERS[name], *[ctypes.c_ulong(a) for a in arguments])
        return "passed" if result >= 0 else errno.errorcode[ctypes.get_errno()]

    calls = {
        "socket tcp": ("socket", 2, 1, 0),
        "socket raw": ("socket", 2, 3, 1),
        "socket packet": ("socket", 17, 3, 0),
        "socket netlink": ("socket", 16, 3, 0),
        "socket unix": ("socket", 1, 1, 0),
        "socketpair inet": ("socketpair", 2, 1, 0, 0),
        "bind": ("bind", handed.fileno(), 0, 0),
        "listen": ("listen", handed.fileno(), 1),
        "bpf": ("bpf", 0, 0, 0),
        "setns": ("setns", 0, 0),
        "unshare user": ("unshare", 0x10000000),
        "unshare net": ("unshare", 0x40000000),
        "clone newuser": ("clone", 0x10000011, 0, 0, 0, 0),
        "ptrace": ("ptrace", 16, os.getppid(), 0, 0),
        "execve": ("execve", 0, 0, 0),
        "execveat": ("execveat", 0, 0, 0, 0, 0),
        "io_uring_setup": ("io_uring_setup", 8, 0),
        "io_uring_enter": ("io_uring_enter", 0, 0, 0, 0),
        "mount": ("mount", 0, 0, 0, 0, 0),
        "process_vm_readv": ("process_vm_readv", os.getppid(), 0, 0, 0, 0, 0),
        "process_vm_writev": ("process_vm_writev", os.getppid(), 0, 0, 0, 0, 0),
        "perf_event_open": ("perf_event_open", 0, 0, 0, 0, 0),
        "userfaultfd": ("userfaultfd", 0),
        "keyctl": ("keyctl", 0, 0),
        "add_key": ("add_key", 0, 0, 0, 0, 0),
        "pidfd_open": ("pidfd_open", os.getppid(), 0),
        "pidfd_getfd": ("pidfd_getfd", 0, 0, 0),
        "kexec_load": ("kexec_load", 0, 0, 0, 0),
        "init_module": ("init_module", 0, 0, 0),
        "finit_module": ("finit_module", 0, 0, 0),
        "prctl dumpable": ("prctl", 4, 1, 0, 0, 0),
        "ioctl tty": ("ioctl", 0, 0x5412, 0),
        "prlimit": ("prlimit64", os.getppid(), 7, 0, 0),
        "another's schedule": ("sched_setattr", os.getppid(), 0, 0),
    }
    out["calls"] = {name: raw(*call) for name, call in calls.items()}
    out["x32"] = errno.errorcode[ctypes.get_errno()] if libc.syscall(0x40000000 | 39) < 0 else "passed"
    out["net"] = open("/proc/self/net/dev").read().count(":")
    out["files"] = {}
    for path in ("/etc/shadow", f"/proc/{os.getppid()}/mem", f"/proc/{os.getppid()}/environ", "/dev/mem"):
        try:
            open(path, "rb").read(1)
            out["files"][path] = "passed"
        except OSError as error:
            out["files"][path] = errno.errorcode[error.errno]
    out["key"] = open(f"/proc/self/fd/{key}").read(10)
    thread = scheduling.LoopThread()
    out["scheduling"] = [thread.crowd(True), thread.crowd(False), scheduling.ran_and_waited()[0] > 0]
    pair = socket.socketpair()
    async def life():
        out["scheduling"].append(await asyncio.to_thread(scheduling.patient))
        handed.setblocking(False)
        asyncio.get_running_loop().add_reader(handed.fileno(), lambda: None)
        reader, writer = await asyncio.open_connection(sock=inside)
        writer.write(b"x")
        await writer.drain()
    uvloop.run(life())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    out["pid"] = os.getpid()
    child = os.fork()
    if not child:
        os._exit(0 if raw("socket", 2, 1, 0) == "EPERM" else 1)
    out["child"] = os.waitpid(child, 0)[1]
    out["limits"] = open("/proc/self/limits").read()
    print(json.dumps(out))
    """
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    key = tmp_path_factory.mktemp("confine") / "key.pem"
    key.write_text("-----BEGIN PRIVATE KEY-----")
    done = subprocess.run([sys.executable, "-c", CHILD, str(key)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_nothing_is_held(seen: dict[str, dict[str, str]]) -> None:
    status = seen["status"]
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert status["Uid"].split() == ["65471"] * 4
    assert status["Gid"].split() == ["65471"] * 4
    assert status["Groups"] == ""


def test_every_way_out_is_refused(seen: dict[str, dict[str, str]]) -> None:
    assert {name: got for name, got in seen["calls"].items() if got != "EPERM"} == {}
    assert seen["x32"] == "EPERM"  # type: ignore[comparison-overlap]
    assert seen["child"] == 0  # type: ignore[comparison-overlap]  # a fork is as confined


def test_no_network_of_its_own(seen: dict[str, int]) -> None:
    assert seen["net"] <= 1  # lo, which is down


def test_files_of_others(seen: dict[str, dict[str, str]]) -> None:
    assert "passed" not in seen["files"].values()


def test_it_can_still_read_the_key_it_was_given(seen: dict[str, str]) -> None:
    assert seen["key"] == "-----BEGIN"


def test_it_can_still_say_which_thread_goes_first(seen: dict[str, list[bool]]) -> None:
    assert seen["scheduling"] == [True, True, True, True]


def test_no_core(seen: dict[str, str]) -> None:
    (line,) = [line for line in seen["limits"].splitlines() if line.startswith("Max core file size")]
    assert line.split()[4:6] == ["0", "0"]


def test_users() -> None:
    assert user_ids("65471") == (65471, 65471)
    assert user_ids(None)[0] not in (0, -1)
    with pytest.raises(ConfineError, match="root"):
        user_ids("root")
    with pytest.raises(ConfineError, match="no user"):
        user_ids("nobody-of-this-name")
    assert DEFAULT_UID == 65471


def test_filter_names_are_all_numbered() -> None:
    assert set(seccomp.NUMBERS) >= seccomp.ALLOWED
    forbidden = [
        "socket",
        "bind",
        "listen",
        "bpf",
        "setns",
        "unshare",
        "ptrace",
        "execve",
        "execveat",
        "io_uring_setup",
        "mount",
        "keyctl",
        "pidfd_getfd",
    ]
    assert not seccomp.ALLOWED & set(forbidden)
    assert len(seccomp.program()) // 8 <= 4096  # BPF_MAXINSNS


def wait_for(condition: object, what: str, timeout_s: float = 10.0 * PATIENCE) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def test_the_proxy_itself(tmp_path: Path) -> None:
    """Sockets for root alone, confined workers, replaced when killed, gone with their parent."""
    proxy = subprocess.Popen(
        [sys.executable, "-m", "l7proxy", "--run-dir", str(tmp_path), "--workers", "2", "--user", "65471"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    try:
        wait_for(lambda: len(children(proxy.pid)) == 2, "two workers")
        for index in range(2):
            path = tmp_path / f"worker-{index}.sock"
            assert path.stat().st_mode & 0o777 == 0o600 and path.stat().st_uid == 0
        first = children(proxy.pid)
        for pid in [proxy.pid, *first]:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
            assert status["Uid"].split() == ["65471"] * 4
            assert status["Seccomp"].strip() == "2"
            assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
        os.kill(first[0], signal.SIGKILL)
        wait_for(lambda: len(children(proxy.pid)) == 2 and first[0] not in children(proxy.pid), "a new worker")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:  # the same path leads to the new one
            agent.connect(str(tmp_path / "worker-0.sock"))
            agent.settimeout(10)
            assert agent.recv(4)
        second = children(proxy.pid)
        proxy.kill()
        proxy.wait(10)

        def gone(pid: int) -> bool:
            try:
                return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                return True

        wait_for(lambda: all(gone(pid) for pid in second), "workers end with their parent")
    finally:
        if proxy.poll() is None:
            proxy.terminate()
        proxy.communicate(timeout=10)


def test_sigterm_ends_it(tmp_path: Path) -> None:
    proxy = subprocess.Popen(
        [sys.executable, "-m", "l7proxy", "--run-dir", str(tmp_path), "--workers", "1", "--user", "65471"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    try:
        wait_for(lambda: children(proxy.pid), "a worker")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
            agent.connect(str(tmp_path / "worker-0.sock"))
            agent.settimeout(10)
            assert agent.recv(4)  # it lives
        proxy.terminate()
        assert proxy.wait(15) == 0
    finally:
        if proxy.poll() is None:
            proxy.kill()
        proxy.communicate(timeout=10)


class Proxy:
    """One that is started in a directory that others use, too; `end` is what a service manager does."""

    def __init__(self, run_dir: Path) -> None:
        argv = [sys.executable, "-m", "l7proxy", "--run-dir", str(run_dir), "--workers", "1", "--user", "65471"]
        self.popen = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.DEVNULL)
        wait_for(lambda: children(self.popen.pid), "a worker")
        (self.worker,) = children(self.popen.pid)

    def end(self) -> None:
        self.popen.terminate()
        assert self.popen.wait(15) == 0


class Agent:
    """Dials a worker and gives it a listener, so that it has something to serve."""

    def __init__(self, path: Path) -> None:
        wait_for(path.exists, f"{path.name}")
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(path))
        self.sock.settimeout(10)
        self.decoder, self.heard = link.Decoder(), list[link.Message]()
        self.until(link.Ready)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            offer = link.Listener("1/outbound/2", "outbound", 1, "127.0.0.1", listener.getsockname()[1])
            socket.send_fds(self.sock, [link.encode(offer, 1)], [listener.fileno()])
        self.say(link.Scrape())
        self.until(link.Metrics)  # after the listener

    def say(self, message: link.Message) -> None:
        self.sock.sendall(link.encode(message))

    def until(self, kind: type) -> link.Message:
        while not (found := [message for message in self.heard if isinstance(message, kind)]):
            self.heard += [message for message, _ in self.decoder.feed(self.sock.recv(1 << 20), [])]
        return found[0]


def ended(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_generations_live_side_by_side(tmp_path: Path) -> None:
    """A planned end leaves the worker behind, confined as it was; the next proxy has its own, in another place, until the
    agent says that it serves. A place that nobody lives in is taken again."""
    first = Proxy(tmp_path)
    agent = Agent(tmp_path / "worker-0.sock")
    first.end()
    leaving = agent.until(link.Leaving)
    assert leaving == link.Leaving(leaving.seconds) and 590 < leaving.seconds <= 600  # type: ignore[attr-defined,call-arg]
    status = dict(line.split(":", 1) for line in Path(f"/proc/{first.worker}/status").read_text().splitlines())
    assert status["Uid"].split() == ["65471"] * 4 and status["Seccomp"].strip() == "2"
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    second = Proxy(tmp_path)
    try:
        next_ready = Agent(tmp_path / "worker-1.sock").until(link.Ready)
        assert next_ready.generation > agent.until(link.Ready).generation > 0  # type: ignore[attr-defined]
        assert not ended(first.worker)
        agent.say(link.Drain(30.0))
        wait_for(lambda: ended(first.worker), "the former worker's end")
        assert agent.until(link.Drained) == link.Drained(0)
    finally:
        second.popen.kill()
        second.popen.wait()
    wait_for(lambda: ended(second.worker), "whoever kills the proxy kills its worker")
    third = Proxy(tmp_path)
    Agent(tmp_path / "worker-0.sock")
    assert not (tmp_path / "worker-1.sock").exists()
    third.popen.kill()
    third.popen.wait()


def test_a_worker_of_a_former_generation_ends_with_sigterm(tmp_path: Path) -> None:
    """As when the machine goes down."""
    proxy = Proxy(tmp_path)
    agent = Agent(tmp_path / "worker-0.sock")
    proxy.end()
    agent.until(link.Leaving)
    os.kill(proxy.worker, signal.SIGTERM)
    wait_for(lambda: ended(proxy.worker), "its end")
