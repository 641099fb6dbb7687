"""Clients that are slow, oversized or gone cost the others nothing, and the proxy little memory."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.mesh import FORGET_PEAK, HTTP_PORT, Mesh, memory, policy

SLOW, OVERSIZED, TRUNCATED = 200, 100, 100
RSS_GROWTH_BYTES_MAX = 64 << 20
REQUESTS, REQUESTS_PER_S = 100, 10


def test_a_flood_of_bad_clients_hurts_nobody_else(mesh: Mesh) -> None:
    (worker,) = mesh.lab.pids("n1", "proxy-worker")
    mesh.apply(policy("flood", "web", who="intruder"))
    try:
        assert mesh.curl("client", f"http://web.shop.mesh:{HTTP_PORT}/")[0] == 200
        before = memory(worker, "VmRSS")
        Path(f"/proc/{worker}/clear_refs").write_text(FORGET_PEAK)
        address = mesh.w["web"].addresses[0]
        flood = mesh.program("intruder", "flood.py", address, HTTP_PORT, SLOW, OVERSIZED, TRUNCATED)
        assert flood.first_line() == "started\n"
        url = f"http://web.shop.mesh:{HTTP_PORT}/"
        client = mesh.program("client", "opener.py", url, REQUESTS_PER_S, REQUESTS / REQUESTS_PER_S)
        good, bad = client.report(timeout_s=40), flood.report(timeout_s=40)
        assert good["statuses"] == {"200": REQUESTS}, good
        assert bad == {"slow": {"408": SLOW}, "oversized": {"431": OVERSIZED}, "left": TRUNCATED, "failed": []}
        assert memory(worker, "VmHWM") - before < RSS_GROWTH_BYTES_MAX
        assert mesh.lab.pids("n1", "proxy-worker") == [worker]
    finally:
        mesh.delete("AuthorizationPolicy", "flood")
    assert mesh.curl("intruder", f"http://web.shop.mesh:{HTTP_PORT}/")[0] == 403
