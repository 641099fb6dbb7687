from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from nodeagent import cgroups
from nodeagent.loader import attach
from tests.bpf.families import FAMILIES
from tests.bpf.steps import capture, connect
from tests.bpf.world import IDENTITY, LEVEL, ORIGIN, ROOT, World, text

V4 = FAMILIES[0]


def test_every_program_stands_behind_a_pinned_link(world: World) -> None:
    assert sorted(path.name for path in (world.fs / "links").iterdir()) == sorted(attach.HOOKS)
    for path in (world.fs / "links").iterdir():
        fd = attach.open_pin(path)
        assert fd is not None
        assert attach.link_cgroup(fd) == world.cgroup.stat().st_ino
        os.close(fd)


def test_layouts_describe_what_crosses_the_boundary(world: World) -> None:
    found = json.loads(world.layouts_path.read_text())
    assert found["reasons"][0] == "native_allowed" and "map_full" in found["reasons"]
    assert found["constants"]["PL_OPT_CALLER"] == 2 and found["constants"]["PL_ROLE_PROXY"] == 3
    origin = found["structs"]["pl_origin"]
    assert origin["size"] == 64 and origin["fields"][0] == ["dst", 0, 16, "addr"]
    assert {"pl_event", "pl_caller", "pl_conn", "pl_peer"} <= set(found["structs"])
    assert (world.layouts_path.stat().st_mode & 0o777) <= 0o644


def test_a_reload_keeps_state_and_leaves_no_gap(world: World) -> None:
    """Established connections, origins and the decision at each of many connects survive."""
    capture(world, V4)
    world.dest(V4.vip, 80, "PROXY")
    connect(world, V4, V4.vip, 80)
    world.agent["a"]("c, _ = l.accept()")
    world.a(
        "import threading, time; ends = []; stop = []\n"
        "def dial():\n"
        "  while not stop:\n"
        "    s2 = socket.socket()\n"
        "    try: s2.connect(('10.201.9.2', 7700)); ends.append('open')\n"
        "    except PermissionError: ends.append('denied')\n"
        "    except OSError as e: ends.append(repr(e))\n"
        "    s2.close(); time.sleep(0.001)\n"
        "t = threading.Thread(target=dial); t.start()"
    )
    for _ in range(10):  # until enough fell into the times of reloads
        world.load()
        if world.a("len(ends)") > 150:
            break
    world.a("stop.append(1); t.join()")
    ends = world.a("len(ends), sorted(set(ends))")
    assert ends[0] > 150 and ends[1] == ["denied"]
    origin = world.origin(world.agent["a"](f"c.getsockopt({LEVEL}, {ORIGIN}, 64)"))
    assert (text(origin["dst"]), origin["identity"]) == (V4.vip, IDENTITY["a"])
    world.a("s.sendall(b'still here')")
    assert world.agent["a"]("c.recv(99)") == b"still here"
    world.a("s.close()")
    world.agent["a"]("c.close(); l.close()")


def test_another_schema_is_refused_and_nothing_changes(world: World) -> None:
    before = {path.name: path.stat().st_ino for path in (world.fs / "links").iterdir()}
    world.configure(schema=99)
    done = world.loader("--cgroup", str(world.cgroup), "--src", str(ROOT / "bpf"), "--layouts", str(world.layouts_path))
    assert done.returncode == 3
    assert "schema 99" in json.loads(done.stdout)["errors"][0] and "--unload" in done.stderr
    assert {path.name: path.stat().st_ino for path in (world.fs / "links").iterdir()} == before


def test_programs_that_do_not_verify_change_nothing(world: World, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "bpf", tmp_path / "bpf")
    bind = tmp_path / "bpf" / "bind.c"
    bind.write_text(bind.read_text() + "\nint broken(void *ctx) { return oops; }\n")
    done = world.load(src=tmp_path / "bpf")
    assert done.returncode == 1
    assert json.loads(done.stdout)["programs"]["connect4"] is False
    assert "bpf/bind.c" in done.stderr
    with pytest.raises(PermissionError):
        connect(world, V4, "10.201.9.2", 7701)


def test_what_is_not_a_bpffs_or_a_cgroup_is_named(world: World, tmp_path: Path) -> None:
    argv = ["--src", str(ROOT / "bpf"), "--layouts", str(tmp_path / "l.json")]
    plain = world.loader("--cgroup", str(tmp_path), *argv)
    assert plain.returncode == 1 and "not a cgroup2 directory" in plain.stderr
    done = world.loader("--cgroup", str(world.cgroup), "--bpf-dir", str(tmp_path), *argv)  # the last --bpf-dir counts
    assert done.returncode == 1 and "mount -t bpf" in done.stderr


def test_a_second_set_comes_and_goes(world: World, tmp_path: Path) -> None:
    """Under directories of its own, on another cgroup; that one made anew, as after a lab went down by force."""
    other, place = world.top / "n2", world.fs / "second"
    place.mkdir(mode=0o700)
    argv = ("--bpf-dir", str(place))
    layouts = str(tmp_path / "l.json")
    for _ in range(2):
        for name in ("agent", "proxy"):
            (other / name).mkdir(parents=True)
        done = world.loader(*argv, "--cgroup", str(other), "--src", str(ROOT / "bpf"), "--layouts", layouts)
        assert done.returncode == 0, done.stderr
        fd = attach.open_pin(place / "links" / "connect4")
        assert fd is not None
        assert attach.link_cgroup(fd) == other.stat().st_ino
        os.close(fd)
        for path in (other / "agent", other / "proxy", other):
            path.rmdir()
    fd = attach.open_pin(place / "maps" / "config")
    assert fd is not None
    value = attach.read_map(fd, bytes(4), 40)
    os.close(fd)
    level = cgroups.level(other.parent) + 2
    assert value is not None and value[:16] == struct.pack("<4I", world.layouts["schema"], 1, level, level + 1)
    done = world.loader(*argv, "--unload")
    assert done.returncode == 0
    assert list(place.iterdir()) == []
