"""What the proxy answers by itself: a status, a reason from a closed list, and one line a person can act on."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

DETAIL_CHARS_MAX = 300
RETRY = "retry-after: 1\r\n"  # budgets are by the second

# reason -> (status, what is wrong when no detail says it better, what to do). Keys are the values of x-pillion-reason
# and of the metric's label.
REASONS: dict[str, tuple[int, str, str]] = {
    "bad_request": (400, "This is not well-formed HTTP/1.1.", "Fix the client."),
    "path_not_canonical": (
        400,
        "The path can be read in two ways.",
        "A policy on paths applies here: send it in canonical form.",
    ),
    "underscore_header": (400, "A header that a policy names is spelt with '_'.", "Spell it with '-'."),
    "policy_denied": (403, "RBAC: denied.", "Allow this caller by an AuthorizationPolicy; ask `pillion policy why`."),
    "no_route": (404, "No rule of the service's HTTPRoutes matches this request.", "See `pillion get httproute`."),
    "head_timeout": (408, "The request head took too long.", "Send it in one go, or raise headTimeoutSeconds of MeshConfig."),
    "head_too_large": (
        431,
        "The request head is too large.",
        "Send fewer or smaller fields, or raise headBytesMax of MeshConfig.",
    ),
    "no_backend": (500, "The HTTPRoute leads to no backend.", "Give it a backendRef that exists and has weight."),
    "budget_requests": (
        429,
        "This identity asks more often than its budget allows.",
        "Send fewer requests, or raise requestsPerSecond in an IdentityBudget; see `pillion top`.",
    ),
    "budget_bytes": (
        429,
        "This identity has too many bytes in flight.",
        "Read what was asked for, or raise bytesInFlight in an IdentityBudget; see `pillion top`.",
    ),
    "budget_descriptors": (
        429,
        "This identity has too many sockets open.",
        "Reuse connections, or raise descriptors in an IdentityBudget; see `pillion top`.",
    ),
    "budget_connections": (
        429,
        "This identity has too many connections open.",
        "Reuse connections, or raise connections in an IdentityBudget; see `pillion top`.",
    ),
    "budget_streams": (
        429,
        "This identity has too many streams open on the endpoint's node.",
        "Reuse connections, or raise streams in an IdentityBudget; see `pillion top`.",
    ),
    "behind_upgrade": (
        400,
        "What came behind a WebSocket handshake that the server refused is not read.",
        "Send nothing before the 101.",
    ),
    "connect_method": (501, "CONNECT is not offered inside the mesh.", "Connect to the service itself."),
    "transfer_encoding": (
        501,
        "The transfer coding is not understood.",
        "Send Content-Length, or Transfer-Encoding: chunked alone.",
    ),
    "bad_response": (502, "The server's response is not well-formed HTTP/1.1.", "Fix the server."),
    "upstream_reset": (502, "The server closed the connection before it answered.", "See the server's log."),
    "no_endpoints": (503, "The service has no endpoint.", "Compare its selector with the labels in `pillion get workload`."),
    "no_service": (503, "This address is no service this node knows.", "See `pillion get service` and `pillion status`."),
    "not_ready": (503, "This node's proxy has no configuration yet.", "Try again; `pillion status` shows what it waits for."),
    "connect_refused": (503, "No endpoint accepts connections.", "Does the server listen on its target port?"),
    "connect_timeout": (503, "No endpoint answered the connection in time.", "Is its node up? See `pillion status`."),
    "connect_reset": (503, "The endpoint reset the connection.", "See the server's log."),
    "dial_denied": (503, "The kernel refused the dial.", "The agent has yet to allow this endpoint; see `pillion status`."),
    "no_stock": (503, "The proxy ran out of sockets.", "Is the node agent running? See `pillion status`."),
    "no_svid": (503, "The caller has no certificate yet.", "See `pillion identity list`."),
    "tls_failed": (503, "TLS to the endpoint's node failed.", "See `pillion status` for both nodes."),
    "peer_identity": (503, "The endpoint's node did not prove the endpoint's identity.", "See `pillion flows` on both nodes."),
    "peer_refused": (503, "The endpoint's node refused the stream.", "See `pillion flows` on that node."),
    "tunnel_lost": (503, "The tunnel to the endpoint's node was lost.", "Try again; `pillion status` shows the node."),
    "no_tunnel": (503, "This proxy has no tunnels to other nodes.", "See `pillion status`."),
    "lease_expired": (
        503,
        "This node has not heard from the controller for longer than policyLeaseSeconds.",
        "See `pillion status`, then the agent's and the controller's logs.",
    ),
    "overloaded": (
        503,
        "This identity has too many connections open on this node.",
        "Close some, or keep them alive and reuse them.",
    ),
    "request_timeout": (504, "The server took too long.", "See the server's log, or raise requestTimeoutSeconds of MeshConfig."),
    "http_version": (505, "Only HTTP/1.0 and HTTP/1.1 are spoken here.", "Make the client use HTTP/1.1."),
}


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the proxy's own. ``detail``: what is wrong, in this case. ``keep``: the connection may go on when the
    request had no body."""

    status: int
    reason: str
    detail: str = ""
    keep: bool = True

    def encode(self, *, close: bool, head_only: bool = False) -> bytes:
        """The whole response; head_only for HEAD, whose body is counted but not sent."""
        _, wrong, remedy = REASONS.get(self.reason, (0, phrase(self.status), ""))
        body = f"{plain(sentence(self.detail or wrong))} {remedy}".rstrip().encode() + b"\n"
        head = (
            f"HTTP/1.1 {self.status} {phrase(self.status)}\r\nserver: pillion\r\nx-pillion-reason: {self.reason}\r\n"
            f"content-type: text/plain; charset=utf-8\r\ncontent-length: {len(body)}\r\n"
            f"{RETRY if self.status == 429 else ''}{'connection: close' if close else ''}"
        )
        return (head if close else head[:-2]).encode("ascii") + b"\r\n\r\n" + (b"" if head_only else body)


def reply(reason: str, detail: str = "", *, keep: bool = True) -> Reply:
    """The reply for a reason of `REASONS`."""
    return Reply(REASONS[reason][0], reason, detail, keep)


def denied(rule: str) -> Reply:
    """403, with the policy that said so."""
    return Reply(403, "policy_denied", f"RBAC: denied by {rule}")


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


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
