"""Whether the kernel carries a request, and if not, why: asked aloud."""

from __future__ import annotations

from mesh.express import machine
from mesh.express.destination import Facts, Refusal, destination_of
from mesh.express.program import compile_program
from mesh.model import State, Workload
from mesh.policy import Peer, PolicySet, Request
from mesh.routing import RouteTable


def head(request: Request) -> bytes:
    """A request as its sender would write it. Raises UnicodeEncodeError."""
    lines = [f"{request.method} {request.path} HTTP/1.1", f"host: {request.host}"]
    for name, value in request.headers.items():
        lines += [f"{name}: {one}" for one in ((value,) if isinstance(value, str) else value)]
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1")


def why(
    state: State, routes: RouteTable, policies: PolicySet, peer: Peer, service_key: str, request: Request, *, caller: str
) -> str:
    """A sentence that starts with "yes" or "no", about a request that came in one piece over a paired connection of the
    workload ``caller``. ``request.port`` is the service's, or the workload's where ``service_key`` is one's."""
    own = state.get(caller)
    node = own.node if isinstance(own, Workload) else ""
    local = {key for key, item in state.items() if isinstance(item, Workload) and item.node == node}
    facts = Facts(state, routes, policies)
    destination = destination_of(facts, peer, service_key, request.port, local=local, caller=caller)
    answer = destination.refusal() or destination.decide(request)
    if isinstance(answer, Refusal):
        return f"no: {answer.reason}"
    program = compile_program(
        state, routes, policies, peer=peer, service_key=service_key, port=request.port, local=local, caller=caller
    )
    if isinstance(program, Refusal):
        return f"no: {program.reason}"
    try:
        raw = head(request)
    except UnicodeEncodeError:
        return "no: it can not be written as a head"
    if len(raw) > machine.WINDOW_BYTES:
        return f"no: its head has {len(raw)} bytes, and the kernel reads {machine.WINDOW_BYTES}"
    if program.read(raw) is None:
        return "no: its head has a form that the kernel leaves to user space"
    return "yes, once the connection is paired"
