"""threats.md 12: two callers never share a server connection, so nobody is shown under another's address."""

from __future__ import annotations

from tests.e2e.mesh import Mesh, policy


def test_two_identities_are_seen_as_two_addresses(mesh: Mesh) -> None:
    mesh.apply(policy("intruder-web", "web", who="intruder"))
    try:
        for _ in range(5):
            for name in ("client", "intruder"):
                status, body = mesh.curl(name, f"http://{mesh.w['web'].addresses[0]}:8080/")
                assert status == 200
                assert body.strip().removeprefix("web for ").removeprefix("::ffff:") == mesh.w[name].addresses[0]
    finally:
        mesh.delete("AuthorizationPolicy", "intruder-web")
