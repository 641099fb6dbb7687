"""What the proxy answers by itself: a status, a reason from a closed list, and one line a person can act on."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

DETAIL_CHARS_MAX = 300

# reason -> (status, what to do). Keys are the values of x-pillion-reason and of the metric's label.
REASONS: dict[str, tuple[int, str]] = {
    "bad_request": (400, "The request is not well-formed HTTP/1.1; fix the client."),
    "path_not_canonical": (400, "A rule on paths applies here; send the path in canonical form."),
    "underscore_header": (400, "A rule names this header; spell it with '-' instead of '_'."),
    "policy_denied": (403, "Add an ALLOW AuthorizationPolicy for this caller, or see `pillion policy why`."),
    "no_route": (404, "No HTTPRoute rule of this service matches the request; see `pillion get httproute`."),
    "head_timeout": (408, "The request head did not arrive in time; the client is slow or stuck."),
    "head_too_large": (431, "The request head is over head_bytes_max of MeshConfig."),
    "connect_method": (501, "CONNECT is not offered inside the mesh."),
    "transfer_encoding": (501, "Only Transfer-Encoding: chunked is understood."),
    "no_backend": (500, "The HTTPRoute's backends do not exist or have no weight; see `pillion get httproute`."),
    "bad_response": (502, "The server's response is not well-formed HTTP/1.1; fix the server."),
    "upstream_reset": (502, "The server closed the connection before it answered; see the server's log."),
    "no_endpoints": (503, "The service has no endpoint; see `pillion get workload` and the service's selector."),
    "no_service": (503, "This address is no service known to this node; see `pillion status`."),
    "not_ready": (503, "This node's proxy has no snapshot yet; see `pillion status`."),
    "connect_refused": (503, "No endpoint accepts connections; is the server listening on its target port?"),
    "connect_timeout": (503, "No endpoint answered the connection in time; is its node up?"),
    "connect_reset": (503, "The endpoint reset the connection; see the server's log."),
    "dial_denied": (503, "The kernel refused the dial: the node agent has not allowed this endpoint yet."),
    "no_stock": (503, "The proxy ran out of sockets; is the node agent running? See `pillion status`."),
    "no_svid": (503, "The caller's certificate is not here yet; see `pillion identity`."),
    "tls_failed": (503, "TLS to the endpoint's node failed; compare the trust bundles of both nodes."),
    "peer_identity": (503, "The endpoint's node showed a certificate of another identity than expected."),
    "peer_refused": (503, "The endpoint's node refused the stream; see its flows."),
    "tunnel_lost": (503, "The tunnel to the endpoint's node was lost."),
    "no_tunnel": (503, "This proxy has no tunnel to other nodes."),
    "overloaded": (503, "This identity has too many connections open on this node."),
    "draining": (503, "This proxy is going away; try again."),
    "request_timeout": (504, "The server did not answer within request_timeout_s of MeshConfig."),
    "http_version": (505, "Only HTTP/1.0 and HTTP/1.1 are spoken here."),
}


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the proxy's own. ``keep``: the connection may go on when the request had no body."""

    status: int
    reason: str
    detail: str = ""
    keep: bool = True

    def encode(self, *, close: bool, head_only: bool = False) -> bytes:
        """The whole response; head_only for HEAD, whose body is counted but not sent."""
        advice = REASONS.get(self.reason, (0, ""))[1]
        line = " ".join(part for part in (self.detail or "", advice) if part)
        body = f"{plain(line)}\n".encode()
        head = (
            f"HTTP/1.1 {self.status} {phrase(self.status)}\r\nserver: pillion\r\nx-pillion-reason: {self.reason}\r\n"
            f"content-type: text/plain; charset=utf-8\r\ncontent-length: {len(body)}\r\n{'connection: close' if close else ''}"
        )
        return (head if close else head[:-2]).encode("ascii") + b"\r\n\r\n" + (b"" if head_only else body)


def reply(reason: str, detail: str = "", *, keep: bool = True) -> Reply:
    """The reply for a reason of `REASONS`."""
    return Reply(REASONS[reason][0], reason, detail, keep)


def denied(rule: str) -> Reply:
    """403, with the policy that said so."""
    return Reply(403, "policy_denied", f"RBAC: denied by {rule}.")


def phrase(status: int) -> str:
    """The standard's reason phrase."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def plain(text: str) -> str:
    """Without control bytes, and not too long: it may carry what a request said."""
    clean = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return clean[:DETAIL_CHARS_MAX]
