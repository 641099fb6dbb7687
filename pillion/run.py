"""run: any program of a plain host as a workload of the mesh.

Its cgroup is made first, the agent is told and gets its certificate, and only then does the program start, in that
cgroup and in the agent's network namespace, with no descriptor inherited: sockets made elsewhere would be refused.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import stat
import struct
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import quote, urlsplit

import typer

from mesh.identity import IdentityError, check_label
from pillion.client import Client, Refused
from pillion.context import NodeOption, chosen, labels_of
from pillion.errors import USAGE, CliError

STARTING_S_MAX = 40.0  # from its cgroup to its first process: an agent answers sooner, with yes or no
STOP_TIMEOUT_S = 5.0
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def agent_pid(url: str) -> int:
    """The process behind an agent's unix socket."""
    path = urlsplit(url).path
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            raise CliError(f"{url} does not answer: {error.strerror}", "is the agent running? see: pillion check") from error
        pid, _, _ = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


def cgroup2_mount(mountinfo: str) -> Path:
    for text in mountinfo.splitlines():
        before, _, after = text.partition(" - ")
        if after.split(" ", 1)[0] == "cgroup2":
            return Path(before.split()[4])
    raise CliError("no cgroup2 is mounted", "mount it: mount -t cgroup2 none /sys/fs/cgroup/unified")


def cgroup_of(pid: int) -> Path:
    """A process's cgroup on cgroup2."""
    mount = cgroup2_mount(Path("/proc/self/mountinfo").read_text())
    for text in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        if text.startswith("0::/") and text != "0::/":
            return mount / text[4:]
    raise CliError(f"the agent (pid {pid}) has no cgroup of its own", "start it in one below the node's: <node>/agent")


def node_cgroup(agent: Path) -> Path:
    """Where the programs are attached: above the agent's own, and above the slice that is the agent's alone."""
    return agent.parent.parent if agent.parent.name == "pillion-agent.slice" else agent.parent


def run(
    command: Annotated[list[str], typer.Argument(help="the program and its arguments, after --")],
    service: Annotated[str, typer.Option(help="the service account it runs as; also its label app=…")],
    namespace: Annotated[str, typer.Option("-n", "--namespace", help="of the service account and the workload")] = "default",
    port: Annotated[list[int] | None, typer.Option(help="a port it listens on; may repeat", min=1, max=65535)] = None,
    label: Annotated[list[str] | None, typer.Option(help="key=value; may repeat")] = None,
    name: Annotated[str | None, typer.Option(help="the workload's name (default: made up)")] = None,
    node: NodeOption = None,
) -> None:
    """Run a program as a workload of this node's mesh; it leaves the mesh when it ends."""
    if os.geteuid() != 0:
        raise CliError("only root may put programs into the mesh", "run it with sudo")
    for what, given in (("--service", service), ("--namespace", namespace), ("--name", name)):
        try:
            check_label(given or "any", what)
        except IdentityError as error:
            raise CliError(str(error), "write for example: --service web --namespace shop", USAGE) from error
    labels = labels_of(service, label)
    url = chosen.endpoints().agent_of(node)
    if not url.startswith("unix://"):
        raise CliError("the agent must be of this machine", "use its unix socket: --agent unix:///run/pillion/agent.sock", USAGE)
    pid, client = agent_pid(url), Client(url)
    parent = node_cgroup(cgroup_of(pid)) / "workloads"
    sweep(parent, client)
    name = name or f"{service}-{secrets.token_hex(3)}"
    cgroup = parent / f"run-{namespace}.{name}"
    try:
        cgroup.mkdir(parents=True)
    except FileExistsError as error:
        raise CliError(f"a workload {namespace}/{name} is running already", "choose another --name") from error
    body = {
        "name": name,
        "namespace": namespace,
        "service_account": service,
        "ports": port or [],
        "labels": labels,
        "cgroup": str(cgroup),
    }
    try:
        _join(client, body)
        print(f"pillion: {namespace}/{name} runs as service account {service}", file=sys.stderr, flush=True)
        if port and (hint := missing_service(namespace, labels, service, port[0])):
            print(hint, file=sys.stderr, flush=True)
        code = _run(command, cgroup, Path(f"/proc/{pid}/ns/net"))
    finally:
        leave(cgroup, client, namespace, name)
    raise typer.Exit(code)


def _join(client: Client, body: dict[str, Any]) -> None:
    """Answers when it is enforced and has its certificate. Raises CliError."""
    try:
        client.call("POST", "/v1/workloads", body)
    except Refused as error:
        if not isinstance(error.body, dict) or error.body.get("reason") != "identity_not_granted":
            raise
        node, namespace, account = client.get("/v1/status")["node"], body["namespace"], body["service_account"]
        raise CliError(error.what, grant_line(node, namespace, account)) from error


def grant_line(node: str, namespace: str, account: str) -> str:
    """What an operator runs so that the node may run the service account."""
    metadata = f"{{name: {f'{node}-{namespace}-{account}'[:63].rstrip('-')}}}"
    spec = f"{{node: {node}, serviceAccounts: [{namespace}/{account}]}}"
    grant = f"{{apiVersion: mesh.pillion.dev/v1alpha1, kind: NodeGrant, metadata: {metadata}, spec: {spec}}}"
    return f"an operator grants it: echo '{grant}' | pillion apply -f -"


def missing_service(namespace: str, labels: dict[str, str], service: str, port: int) -> str:
    """How to be found by others, if no Service selects the workload yet and the controller can be asked; else nothing."""
    where = chosen.endpoints()
    if where.controller is None:
        return ""
    try:
        items = Client(where.controller).get(f"/v1/resources?kind=Service&namespace={quote(namespace, safe='')}")["items"]
    except CliError:
        return ""
    if any(item["spec"]["selector"].items() <= labels.items() for item in items):
        return ""
    metadata, ports = f"{{name: {service}, namespace: {namespace}}}", f"[{{port: {port}}}]"
    spec = f"{{selector: {{app: {service}}}, ports: {ports}}}"
    resource = f"{{apiVersion: v1, kind: Service, metadata: {metadata}, spec: {spec}}}"
    return f"pillion: no Service selects it yet; others find it after\n  echo '{resource}' | pillion apply -f -"


def _run(command: list[str], cgroup: Path, netns: Path) -> int:
    """Fork, move the child, exec; pass signals on; its exit code (128 + signal, as shells do)."""
    failure_r, failure_w = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _become(command, cgroup, netns, failure_w, parent)
    os.close(failure_w)

    def forward(number: int, _: Any) -> None:
        os.kill(child, number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells the child itself
    with os.fdopen(failure_r, "rb") as pipe:
        failure = pipe.read(4096).decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if failure:
        raise CliError(f"{command[0]}: {failure}", "check the command; a path without / is looked up in PATH")
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def _become(command: list[str], cgroup: Path, netns: Path, failure: int, parent: int) -> NoReturn:
    try:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before it could be watched
            os._exit(127)
        (cgroup / "cgroup.procs").write_text("0")
        if os.stat(netns).st_ino != os.stat("/proc/self/ns/net").st_ino:
            fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
            if _libc.setns(fd, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "cannot enter the node's network namespace")
        for fd in (0, 1, 2):
            if is_internet_socket(fd):
                null = os.open("/dev/null", os.O_RDWR)
                os.dup2(null, fd)
        low = min(failure, 3)
        os.closerange(3, failure)
        os.closerange(max(failure, low) + 1, os.sysconf("SC_OPEN_MAX"))
        for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.execvp(command[0], command)  # noqa: S606  # becomes the program
    except BaseException as error:
        text = getattr(error, "strerror", None) or str(error)
        os.write(failure, text.encode())
    finally:
        os._exit(127)


def is_internet_socket(fd: int) -> bool:
    """Whether a descriptor is a socket another cgroup could have made for the network."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return False
        with socket.socket(fileno=os.dup(fd)) as probe:
            return probe.family != socket.AF_UNIX
    except OSError:
        return False


def leave(cgroup: Path, client: Client, namespace: str, name: str) -> None:
    """End what is left of the workload and take it out of the mesh. Safe to repeat."""
    try:
        (cgroup / "cgroup.kill").write_text("1")
    except OSError:
        pass
    try:
        client.call("DELETE", f"/v1/workloads/{quote(namespace, safe='')}/{quote(name, safe='')}")
    except CliError as error:
        if getattr(error, "status", 0) != 404:
            print(f"pillion: {namespace}/{name} could not be removed: {error.what}", file=sys.stderr)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while cgroup.exists():
        try:
            for directory, _, _ in os.walk(cgroup, topdown=False):
                Path(directory).rmdir()
        except OSError:
            if time.monotonic() > deadline:
                print(f"pillion: {cgroup} could not be removed", file=sys.stderr)
                return
            time.sleep(0.02)


def sweep(parent: Path, client: Client) -> None:
    """Leftovers of runs that were killed: their cgroups are empty."""
    for cgroup in parent.glob("run-*.*") if parent.is_dir() else []:
        try:
            old = time.time() - cgroup.stat().st_mtime > STARTING_S_MAX
            empty = "populated 0" in (cgroup / "cgroup.events").read_text()
        except OSError:
            continue
        if old and empty:
            namespace, _, name = cgroup.name.removeprefix("run-").partition(".")
            leave(cgroup, client, namespace, name)
