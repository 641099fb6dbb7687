"""The parts of the VM lab that need no VM."""

from __future__ import annotations

import re
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab import LabError
from lab.vm import VmLab, guest, kernels
from lab.vm.channel import ending
from lab.vm.initrd import archive, unpacked
from lab.vm.kernels import Kernel, archive_of, kernel, packages, pick, tool
from lab.vm.plan import Kind, Vm
from lab.vm.precompiled import bcc as stand_in
from lab.vm.qemu import command_line, mount_of
from lab.vm.stage import PROJECT
from lab.vm.switch import LENGTH, Switch
from nodeagent import express_count
from nodeagent.loader.layouts import name_of, nested


def frames(*kinds: bytes) -> bytes:
    return b"".join(guest.frame(b"12345678", kind, b"payload") for kind in kinds)


def test_the_parser_finds_frames_however_they_are_cut() -> None:
    whole = frames(guest.STDOUT, guest.STDERR, guest.EXIT)
    for size in (1, 7, 1000):
        parser, found = guest.Parser(), []
        for start in range(0, len(whole), size):
            found += parser.feed(whole[start : start + size])
        assert [kind for _, kind, _ in found] == [guest.STDOUT, guest.STDERR, guest.EXIT]
        assert {payload for *_, payload in found} == {b"payload"}


@pytest.mark.parametrize("cut", [1, 5, 16, 17, 20])
def test_a_session_is_found_behind_the_rest_of_another(cut: int) -> None:
    """A host died after `cut` bytes of a frame: padding fills that up, HELLO is seen."""
    old = guest.frame(b"oldnonce", guest.STDIN, bytes(guest.PAYLOAD_BYTES_MAX))[:cut]
    parser = guest.Parser()
    found = parser.feed(old + guest.PADDING + guest.frame(b"newnonce", guest.HELLO))
    assert found[-1] == (b"newnonce", guest.HELLO, b"")
    assert all(nonce != b"newnonce" for nonce, *_ in found[:-1])


def test_junk_is_skipped() -> None:
    parser = guest.Parser()
    junk = b"PLv" + guest.MAGIC + b"\xff" * 13
    assert [kind for _, kind, _ in parser.feed(junk + frames(guest.RUN))] == [guest.RUN]


def test_the_newest_stock_kernel_is_picked() -> None:
    names = [
        "linux-image-6.1.0-9-cloud-amd64",
        "linux-image-6.1.0-56-cloud-amd64",
        "linux-image-6.1.0-57-amd64",
        "linux-image-6.1.0-58-cloud-amd64-unsigned",
        "linux-image-6.1.0-59-rt-amd64",
        "linux-image-6.12.9+deb12-cloud-amd64",
        "linux-image-6.12.117+deb12-cloud-amd64",
        "linux-image-6.12-cloud-amd64",
        "linux-image-6.10.11+bpo-amd64",
        "linux-image-6.8.0-31-generic",
    ]
    assert pick("6.1", names) == "linux-image-6.1.0-56-cloud-amd64"
    assert pick("6.12", names) == "linux-image-6.12.117+deb12-cloud-amd64"
    assert pick("6.10", names) == "linux-image-6.10.11+bpo-amd64"
    assert pick("6.8", names) == "linux-image-6.8.0-31-generic"
    assert pick("6.11", names) is None


@pytest.mark.parametrize("name", ["../../etc", "ubuntu-", "ubuntu-6.8/..", "debian-6.1"])
def test_a_kernel_is_named_by_its_series(name: str) -> None:
    with pytest.raises(LabError, match="not a series"):
        kernel(name)


def test_a_kernel_comes_with_its_modules() -> None:
    assert packages("linux-image-6.1.0-56-cloud-amd64") == ["linux-image-6.1.0-56-cloud-amd64"]
    assert packages("linux-image-6.8.0-31-generic") == ["linux-image-6.8.0-31-generic", "linux-modules-6.8.0-31-generic"]


def test_ubuntus_kernels_come_from_ubuntu_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "CACHE", tmp_path)
    apt = archive_of("ubuntu-6.8")
    fetched = tool("apt-get", *apt, "update", "--print-uris").splitlines()
    assert fetched and all(each.startswith("'http://archive.ubuntu.com/ubuntu/dists/") for each in fetched)
    assert f"where='{tmp_path}/ubuntu/lists/'" in tool("apt-config", *apt, "shell", "where", "Dir::State::Lists/d")
    assert archive_of("6.1") == []


@pytest.mark.parametrize("pack", ["cat", "xz", "zstd"])
def test_a_module_is_unpacked_however_it_was_packed(pack: str, tmp_path: Path) -> None:
    place = tmp_path / {"cat": "one.ko", "xz": "one.ko.xz", "zstd": "one.ko.zst"}[pack]
    place.write_bytes(subprocess.run([pack], input=b"a module", capture_output=True, check=True).stdout)
    assert unpacked(place) == b"a module"


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    made = Kernel("6.1", "r", tmp_path)
    made.modules.mkdir(parents=True)
    lines = ["kernel/a/c.ko.xz: kernel/a/b-b.ko.xz kernel/a/a.ko.xz", "kernel/a/b-b.ko.xz: kernel/a/a.ko.xz", "kernel/a/a.ko.xz:"]
    (made.modules / "modules.dep").write_text("\n".join(lines) + "\n")
    assert [path.name for path in made.with_dependencies(["c", "a", "builtin"])] == ["a.ko.xz", "b-b.ko.xz", "c.ko.xz"]


def test_the_archive_is_one_that_cpio_reads(tmp_path: Path) -> None:
    busybox = shutil.which("busybox")
    assert busybox, "run: deploy/setup.sh vm"
    data = archive(iter([("d", 0o40755, b""), ("d/file", 0o100644, b"12345"), ("init", 0o100755, b"#!")]))
    subprocess.run([busybox, "cpio", "-i"], input=data, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "d" / "file").read_bytes() == b"12345"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755


def plan(kind: Kind, **more: object) -> Vm:
    return Vm("m1", 1, kind, Path("/k"), Path("/m"), **more)  # type: ignore[arg-type]


def test_the_command_line_says_what_the_initramfs_does() -> None:
    quick = command_line(plan(Kind.QUICK)).split()
    assert {"pillion.kind=quick", "pillion.host=m1", "pillion.ip=10.78.0.11/24,fd78::11/64", "pillion.modules=/m"} <= set(quick)
    assert not any(word.startswith("pillion.outside") for word in quick)
    assert "pillion.outside=eth1" in command_line(plan(Kind.MACHINE, outside=True))
    assert "pillion.outside=eth0" in command_line(plan(Kind.MACHINE, outside=True, network=False))


def test_the_mount_of_a_path() -> None:
    assert mount_of(Path("/proc/self/status")) == Path("/proc")
    assert mount_of(Path("/")) == Path("/")


class Wire:
    """A card on a switch."""

    def __init__(self, switch: Switch, path: Path) -> None:
        self.switch, self.sock = switch, socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.switch.turn(1)
        self.sock.settimeout(0.2)

    def send(self, destination: int, source: int) -> bytes:
        frame = bytes([destination]) + bytes(5) + bytes([source]) + bytes(5) + b"data"
        data = LENGTH.pack(len(frame)) + frame
        self.sock.sendall(data[:3])
        self.switch.turn(1)
        self.sock.sendall(data[3:])
        self.switch.turn(1)
        self.switch.turn(0)
        return data

    def got(self) -> bytes:
        try:
            return self.sock.recv(4096)
        except TimeoutError:
            return b""


def test_the_switch_floods_what_it_does_not_know_and_learns(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    switch = Switch(listener, None)
    a, b, c = (Wire(switch, path) for _ in range(3))
    first = a.send(0xFF, 2)  # broadcast, from 2
    assert (a.got(), b.got(), c.got()) == (b"", first, first)
    unknown = b.send(6, 4)
    assert (a.got(), c.got()) == (unknown, unknown)
    known = c.send(4, 6)
    assert (a.got(), b.got()) == (b"", known)
    b.sock.sendall(LENGTH.pack(1 << 30))  # no frame is so long: the card goes, the others stay
    switch.turn(1)
    again = a.send(0xFF, 2)
    assert c.got() == again
    for wire in (a, b, c):
        wire.sock.close()
    listener.close()


def test_names_that_are_not_names() -> None:
    for name in ("", "UP", "a-b", "../x", "a" * 13):
        with pytest.raises(LabError):
            VmLab(name)
    with pytest.raises(LabError, match="VM name"):
        VmLab("nosuch").start("No", "6.1")


@pytest.mark.parametrize(
    ("code", "says"), [("0", "its kernel went down"), ("137", "killed"), ("1", "exit code is 1"), ("", "from outside")]
)
def test_a_vm_that_ended_says_how(tmp_path: Path, code: str, says: str) -> None:
    (tmp_path / "exit").write_text(f"{code}\n")
    assert says in ending(tmp_path, 0.0)


TYPE = ["pl_a", [["n", "unsigned int"], ["b", ["pl_b", [["c", "unsigned char", [5]]], "struct"]], ["l", "unsigned long long"]]]


@pytest.mark.parametrize("kind", ["struct", "struct_packed", "union"])
def test_the_stand_in_reads_types_as_bcc_does(kind: str) -> None:
    import bcc  # LLVM, for this alone

    ours, theirs = (each._decode_table_type([*TYPE, kind]) for each in (stand_in.BPF, bcc.BPF))
    assert nested(ours) == nested(theirs) and name_of(ours) == "pl_a"


def test_the_stand_in_keeps_which_map_an_instruction_names() -> None:
    plain = struct.pack("<BBhi", 0xB7, 0, 0, 1)
    second_half = struct.pack("<BBhi", 0, 0, 0, 0)
    code = plain + struct.pack("<BBhi", 0x18, 0x11, 0, 7) + second_half + struct.pack("<BBhi", 0x18, 0x01, 0, 7) + second_half
    assert stand_in.references(code, {7: "config"}) == [(8, "config")]
    with pytest.raises(ValueError, match="can not be kept"):
        stand_in.references(struct.pack("<BBhi", 0x18, 0x21, 0, 7) + second_half, {7: "config"})


def test_the_stand_in_is_what_the_loaders_use() -> None:
    """Whoever asks more of BCC finds out here, not in a VM."""
    used = set()
    for path in (PROJECT / "nodeagent").rglob("*.py"):
        used |= set(re.findall(r"\bBPF\.(\w+)|\blib\.(bpf_\w+)", path.read_text()))
    names = {name for pair in used for name in pair if name}
    assert names and all(hasattr(stand_in.BPF, name) or hasattr(stand_in.lib, name) for name in names), names


def test_the_stand_in_finds_what_stepped_aside_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a machine it has the place of the distribution's package."""
    theirs = {name: module for name, module in sys.modules.items() if name == "bcc" or name.startswith("bcc.")}
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc" / "__init__.py").write_text("WHERE = 'aside'\n")
    monkeypatch.setattr(stand_in, "ASIDE", str(tmp_path))
    try:
        assert stand_in.real().WHERE == "aside" and str(tmp_path) not in sys.path
    finally:
        sys.modules.pop("bcc", None)
        sys.modules.update(theirs)


def test_what_bcc_attaches_by_its_name_goes_to_bcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's function it belongs to is found by BCC: such a module is never a stored one."""
    made: list[object] = []
    monkeypatch.setattr(stand_in, "real", lambda: SimpleNamespace(BPF=lambda text, cflags: made.append(cflags) or "BCC's"))
    monkeypatch.setattr(stand_in, "place_of", lambda key: pytest.fail("it was looked for among the stored"))
    assert stand_in.BPF("text", [f"-DTELL={express_count.NAMES[0]}"]) == "BCC's" and made
