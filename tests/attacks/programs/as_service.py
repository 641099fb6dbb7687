"""What a service that was taken over does to leave its cgroup. argv: the folder for answers, a step and what it needs; prints
nothing, writes JSON to ANSWERS/<step>.json: {"error": "" or what the kernel said, "status": what web.shop.mesh answered}."""

import ctypes
import http.client
import json
import os
import socket
import subprocess
import sys
import time

PIDFD_GETFD = 438


def ask() -> str:
    try:
        conn = http.client.HTTPConnection("web.shop.mesh", 80, timeout=10)
        conn.request("GET", "/")
        return str(conn.getresponse().status)
    except OSError as error:
        return type(error).__name__


def move(cgroup: str) -> str:
    """Write oneself into another service's cgroup, then speak as it."""
    with open(f"{cgroup}/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
    return ask()


def manager(slice_: str) -> str:
    """Have the service manager start a program in another service's slice."""
    argv = ["systemd-run", "-q", "--wait", "--pipe", f"--slice={slice_}", "curl", "-s", "-m", "10", "-o", "/dev/null"]
    done = subprocess.run([*argv, "-w", "%{http_code}", "http://web.shop.mesh/"], capture_output=True, text=True, timeout=60)
    if done.returncode and not done.stdout:
        raise OSError(done.stderr.strip() or done.returncode)
    return done.stdout


def outside(unit: str) -> str:
    """Reach the manager's own socket (systemctl would go on to D-Bus), and have a unit that is none of the mesh started by D-Bus:
    the ways that worked."""
    failed, worked = [], []
    try:
        with socket.socket(socket.AF_UNIX) as private:
            private.connect("/run/systemd/private")
        worked.append("private")
    except OSError as error:
        failed.append(f"private: {error}")
    by_bus = {**os.environ, "SYSTEMCTL_FORCE_BUS": "1"}
    done = subprocess.run(["systemctl", "start", unit], capture_output=True, text=True, timeout=60, env=by_bus)
    if done.returncode:
        failed.append(f"bus: {done.stderr.strip()}")
    else:
        worked.append("bus")
    if not worked:
        raise OSError("; ".join(failed))
    return " ".join(worked)


def take(pid: str) -> str:
    """Copy the connection that another process has open to web, and ask on it."""
    process = os.pidfd_open(int(pid))
    for name in os.listdir(f"/proc/{pid}/fd"):
        copied = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, process, int(name), 0)
        if copied < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        try:
            sock = socket.socket(fileno=copied)
            if sock.type == socket.SOCK_STREAM and sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.settimeout(10)
                sock.sendall(b"GET / HTTP/1.1\r\nHost: web.shop.mesh\r\n\r\n")
                return sock.recv(99).split()[1].decode()
        except OSError:
            continue
    raise OSError("no such connection")


def hold(_: str) -> str:
    """Not an attack: have a connection open, always, and say who one is."""
    while True:
        with socket.create_connection(("web.shop.mesh", 80), 10):
            write({"error": "", "status": str(os.getpid())})
            time.sleep(4)


def write(answer: dict[str, str]) -> None:
    with open(f"{folder}/{step}.new", "w") as file:
        json.dump(answer, file)
    os.rename(f"{folder}/{step}.new", f"{folder}/{step}.json")


STEPS = {"move": move, "manager": manager, "outside": outside, "take": take, "hold": hold}
folder, step, argument = sys.argv[1:4]
try:
    write({"error": "", "status": STEPS[step](argument)})
except OSError as failure:
    write({"error": str(failure), "status": ask()})
