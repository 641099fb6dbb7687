"""Keys and certificates: made here, checked when they come back, rotated, dropped."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.keys import CertificateRefused, Leaf, Secret, make_csr, make_key, renew_at, sealed_memfd
from nodeagent.svid import Held, SignRefused, SvidDirectory, Svids
from tests.nodeagent.fakes import Authority, until

WEB, DB = (f"spiffe://mesh.local/ns/shop/sa/{name}" for name in ("web", "db"))


class World:
    """Svids with an authority whose mood can be set."""

    def __init__(self, directory: Path, ttl_s: float = 3600.0) -> None:
        self.authority = Authority(ttl_s)
        self.directory = SvidDirectory(directory)
        self.failure: Exception | None = None
        self.answer_uri = ""
        self.asked = 0
        self.log: list[str] = []
        self.svids = self.open()

    def open(self) -> Svids:
        return Svids(
            self.directory,
            self.sign,
            lambda held: self.log.append(f"held {held.spiffe}"),
            lambda spiffe: self.log.append(f"gone {spiffe}"),
        )

    async def sign(self, csr: str, spiffe: str) -> str:
        self.asked += 1
        if self.failure is not None:
            raise self.failure
        return self.authority.sign(csr, self.answer_uri or spiffe)

    def serial(self, spiffe: str = WEB) -> str:
        held = self.svids.held.get(spiffe)
        return held.leaf.serial if held else ""


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path / "svids")
    yield made
    await made.svids.close()


async def test_wanted_is_held_unwanted_is_dropped_with_its_key(world: World) -> None:
    world.svids.want(frozenset({WEB, DB}))
    await until(lambda: len(world.svids.held) == 2)
    world.svids.want(frozenset({WEB}))
    assert set(world.svids.held) == {WEB} and f"gone {DB}" in world.log
    assert world.directory.load(DB) is None and world.directory.load(WEB) is not None


async def test_a_restart_uses_what_is_on_disk(world: World) -> None:
    world.svids.want(frozenset({WEB}))
    await until(world.serial)
    serial = world.serial()
    await world.svids.close()
    world.failure = OSError("the controller is dead")
    world.svids = world.open()
    world.svids.want(frozenset({WEB}))
    await until(world.serial)
    assert world.serial() == serial


def test_keys_that_are_good_for_nothing_are_swept_at_the_start(tmp_path: Path) -> None:
    """Of identities that left while no agent was there; nobody else would ever take them away."""
    directory = SvidDirectory(tmp_path / "svids")
    key = make_key()
    for ttl_s, spiffe in ((3600.0, WEB), (0.0, DB)):
        directory.save(Held(spiffe, Authority(ttl_s).sign(make_csr(key, spiffe), spiffe), key, now=0.0))
    (tmp_path / "svids" / "junk").write_bytes(b"{")
    again = SvidDirectory(tmp_path / "svids")
    assert again.load(WEB) is not None and len(list((tmp_path / "svids").iterdir())) == 1


async def test_rotation_keeps_the_old_until_the_new_is_there(world: World) -> None:
    world.svids.want(frozenset({WEB}))
    await until(world.serial)
    serial = world.serial()
    world.failure = OSError("no controller")
    assert world.svids.rotate() == 1
    await until(lambda: world.svids.errors)
    assert world.serial() == serial
    world.failure = None
    await until(lambda: world.serial() != serial)
    assert "gone" not in " ".join(world.log)


async def test_rotated_at_half_life_and_dropped_at_the_end(tmp_path: Path) -> None:
    world = World(tmp_path / "svids", ttl_s=3.0)
    try:
        world.svids.want(frozenset({WEB}))
        await until(world.serial)
        serial = world.serial()
        await until(lambda: world.serial() not in ("", serial))
        world.failure = OSError("no controller")
        await until(lambda: not world.svids.held)
        assert world.svids.counts["expired"] == 1
        world.failure = None
        await until(world.serial)
    finally:
        await world.svids.close()


async def test_a_revoked_one_is_replaced_and_not_loaded_again(world: World) -> None:
    world.svids.want(frozenset({WEB}))
    await until(world.serial)
    serial = world.serial()
    await world.svids.close()
    world.svids = world.open()
    world.svids.revoke(frozenset({serial}))
    world.svids.want(frozenset({WEB}))
    await until(world.serial)
    assert world.serial() != serial
    serial = world.serial()
    assert world.svids.revoke(frozenset({serial})) == {WEB}
    assert not world.svids.held
    await until(world.serial)
    assert world.serial() != serial


async def test_a_refusal_is_counted_and_asked_again(world: World) -> None:
    world.failure = SignRefused("identity_not_scheduled", "not here")
    world.svids.want(frozenset({WEB}))
    await until(lambda: world.svids.counts["refused"] >= 2)
    assert "not here" in world.svids.errors[WEB]
    world.failure = None
    await until(world.serial)
    assert not world.svids.errors


async def test_a_certificate_for_somebody_else_is_not_used(world: World) -> None:
    world.answer_uri = DB
    world.svids.want(frozenset({WEB}))
    await until(lambda: world.svids.counts["failed"] >= 1)
    assert not world.svids.held and "asked was" in world.svids.errors[WEB]


def test_files_are_private_and_damage_is_dropped(tmp_path: Path) -> None:
    directory = SvidDirectory(tmp_path / "svids")
    key = make_key()
    directory.save(Held(WEB, Authority().sign(make_csr(key, WEB), WEB), key))
    (path,) = (tmp_path / "svids").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    for junk in (path.read_bytes()[:50], b'{"spiffe": "\xff"}'):
        path.write_bytes(junk)
        assert directory.load(WEB) is None and not path.exists()


def test_the_memfd_is_sealed() -> None:
    fd = sealed_memfd(Secret(b"key"))
    try:
        assert os.pread(fd, 10, 0) == b"key"
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    finally:
        os.close(fd)


def test_a_secret_does_not_print() -> None:
    assert "PRIVATE" not in f"{make_key()!r} {make_key()}"


def test_a_certificate_of_another_key_is_refused() -> None:
    chain = Authority().sign(make_csr(make_key(), WEB), WEB)
    with pytest.raises(CertificateRefused, match="another key"):
        Leaf(chain).check(make_key(), WEB)
    with pytest.raises(CertificateRefused):
        Leaf("nonsense")


def test_renewal_is_spread_around_half_life() -> None:
    found = [renew_at(1000.0, 2000.0, random.Random(seed)) for seed in range(50)]
    assert min(found) >= 1400 and max(found) <= 1600 and len(set(found)) > 40


async def test_closing_leaves_no_task(world: World) -> None:
    world.svids.want(frozenset({WEB, DB}))
    await world.svids.close()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("svid")]
