"""operator add writes over nothing that somebody may need."""

from __future__ import annotations

from pathlib import Path

from tests.pillion.conftest import Cli, Fake


def test_what_an_operator_has_is_not_written_over(cli: Cli, controller: Fake, tmp_path: Path) -> None:
    answer = {"chain": "CHAIN", "bundle": "ROOTS", "serial": "ab", "not_after": 4e9, "controller": ["https://10.0.0.1:15443"]}
    for name in ("ann", "bob", "eve"):
        controller.on(f"POST /v1/operators/{name}", answer)
    controller.on("POST /v1/certificates/ab/revoke", {"revision": 9})
    add, roots = ("--controller", controller.url, "operator", "add", "--out", tmp_path), tmp_path / "ca.crt"
    assert cli(*add, "ann").code == 0
    written = roots.stat()
    assert cli(*add, "bob").code == 0 and roots.stat().st_mtime_ns == written.st_mtime_ns and roots.read_text() == "ROOTS"
    roots.write_text("ANOTHER MESH'S ROOTS")
    there = set(tmp_path.iterdir())
    done = cli(*add, "eve")
    assert done.code == 1 and f"{roots} is there already, and holds other roots" in done.err and "--replace-roots" in done.err
    assert roots.read_text() == "ANOTHER MESH'S ROOTS" and set(tmp_path.iterdir()) == there
    assert controller.asked[-1][1] == "/v1/certificates/ab/revoke"  # its key is gone: nobody's
    assert cli(*add, "--replace-roots", "eve").code == 0
    assert roots.read_text() == "ROOTS" and roots.stat().st_mode & 0o777 == 0o644
    (tmp_path / "ann.key").unlink()
    (tmp_path / "ann.crt").write_text("OLD")
    asked = len(controller.asked)
    done = cli(*add, "ann")
    assert done.code == 1 and "ann.crt is there already" in done.err and len(controller.asked) == asked
    assert (tmp_path / "ann.crt").read_text() == "OLD" and not (tmp_path / "ann.key").exists()


def test_roots_are_written_through_no_link(cli: Cli, controller: Fake, tmp_path: Path) -> None:
    """The folder may be another user's, and the command root's."""
    answer = {"chain": "CHAIN", "bundle": "ROOTS", "serial": "ab", "not_after": 4e9, "controller": []}
    controller.on("POST /v1/operators/ann", answer)
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    out.mkdir()
    (out / "ca.crt").symlink_to(elsewhere)
    add = ("--controller", controller.url, "operator", "add", "ann", "--out", out)
    assert cli(*add).code == 1 and not elsewhere.exists()
    elsewhere.write_text("PRECIOUS")
    assert cli(*add, "--replace-roots").code == 0
    assert elsewhere.read_text() == "PRECIOUS" and (out / "ca.crt").read_text() == "ROOTS"
