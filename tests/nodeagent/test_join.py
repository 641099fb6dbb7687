"""How a node becomes a member, and its line to the controller."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from mesh import snapshot
from nodeagent.controller_client import CallFailed, CallRefused, ControllerClient
from nodeagent.join import JoinError, Misplaced, NodeIdentity, Token, joined, read_token, token_of
from nodeagent.membership import Membership
from nodeagent.workloads import Spec
from tests.nodeagent.fakes import Authority, FakeController, until

SPEC = Spec(name="web-1", namespace="shop", service_account="web", cgroup="/cg/web", addresses=("10.1.0.1",))


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[FakeController]:
    made = FakeController(Authority(), tmp_path)
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def member(controller: FakeController, tmp_path: Path) -> NodeIdentity:
    identity = NodeIdentity("n1", tmp_path / "state")
    await identity.join(read_token(controller.token(), "n1"))
    return identity


def token(**changes: object) -> str:
    body = {"controller": ["https://127.0.0.1:1"], "ca": "PEM", "node": "n1", "secret": "s", **changes}
    return base64.urlsafe_b64encode(json.dumps(body).encode()).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "!!",
        "bm8=",
        token(node="n2"),
        token(controller=[]),
        token(controller=["http://127.0.0.1:1"]),
        token(secret=7),
        "\x00é",
    ],
)
def test_a_bad_token_is_told_with_the_remedy(text: str) -> None:
    with pytest.raises(JoinError, match="pillion node token n1"):
        read_token(text, "n1")


def test_a_token_does_not_print_its_secret() -> None:
    assert "hush" not in repr(read_token(token(secret="hush"), "n1"))


def test_no_token_file_is_told(tmp_path: Path) -> None:
    for path in (None, tmp_path / "absent"):
        with pytest.raises(JoinError, match="pillion node token n1"):
            token_of(path, "n1")


async def test_a_join_is_kept(member: NodeIdentity, tmp_path: Path) -> None:
    again = NodeIdentity("n1", tmp_path / "state")
    assert again.load() and again.controllers == member.controllers
    assert again.leaf is not None and member.leaf is not None and again.leaf.serial == member.leaf.serial
    names = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()}
    assert names == {"node.key": 0o600, "node.pem": 0o600, "bundle.pem": 0o644, "home.json": 0o600}


@pytest.mark.parametrize("name", ["node.key", "node.pem", "bundle.pem", "home.json"])
async def test_a_damaged_identity_is_not_used(member: NodeIdentity, tmp_path: Path, name: str) -> None:
    path = tmp_path / "state" / name
    path.write_bytes(path.read_bytes()[:40])
    assert not NodeIdentity("n1", tmp_path / "state").load()


async def test_a_join_that_was_interrupted_goes_on(controller: FakeController, tmp_path: Path) -> None:
    """With its key, which the token may be bound to; with a new one, where that can not be read."""
    identity = NodeIdentity("n1", tmp_path / "state")
    for junk in (b"", b"junk", b"-----BEGIN PRIVATE KEY-----\n"):
        (tmp_path / "state/joining.key").write_bytes(junk)
        await identity.join(read_token(controller.token(), "n1"))
        assert identity.load()


async def test_another_nodes_directory_is_left_alone(member: NodeIdentity, tmp_path: Path) -> None:
    with pytest.raises(Misplaced, match="--state-dir"):
        NodeIdentity("n2", tmp_path / "state").load()
    assert NodeIdentity("n1", tmp_path / "state").load()


async def test_a_refused_join_says_why(controller: FakeController, tmp_path: Path) -> None:
    controller.refuse_join = "token_used"
    identity = NodeIdentity("n1", tmp_path / "state")
    with pytest.raises(JoinError, match="token_used"):
        await identity.join(read_token(controller.token(), "n1"))
    with pytest.raises(CallFailed):
        identity.context()


async def test_a_controller_of_another_authority_is_not_trusted(controller: FakeController, tmp_path: Path) -> None:
    stranger = json.loads(base64.urlsafe_b64decode(controller.token()))
    stranger["ca"] = Authority().root
    text = base64.urlsafe_b64encode(json.dumps(stranger).encode()).decode()
    with pytest.raises(CallFailed):
        await NodeIdentity("n1", tmp_path / "state").join(read_token(text, "n1"))


async def test_a_new_token_in_the_file_is_taken(controller: FakeController, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("nonsense")
    identity = NodeIdentity("n1", tmp_path / "state")
    task = asyncio.create_task(joined(identity, file))
    await asyncio.sleep(0)
    file.write_text(controller.token())
    await asyncio.wait_for(task, 10)
    assert identity.leaf is not None


async def test_a_used_token_is_known_after_a_restart_and_a_renewal(
    member: NodeIdentity, controller: FakeController, tmp_path: Path
) -> None:
    client = ControllerClient(list(member.controllers), member.context)
    try:
        await member.renew(client)
    finally:
        await client.close()
    again = NodeIdentity("n1", tmp_path / "state")
    assert again.load()
    for identity in (member, again):
        assert identity.joined_by(read_token(controller.token(), "n1"))
        assert not identity.joined_by(read_token(token(secret="another"), "n1"))


async def test_a_node_that_is_let_in_again_asks_at_once(member: NodeIdentity, controller: FakeController) -> None:
    client = ControllerClient(list(member.controllers), member.context, rng=Patient())
    asked: list[str] = []

    async def refused(reason: str) -> bool:
        asked.append(reason)
        controller.refuse_stream = ""
        return True

    ups: list[int] = []
    controller.refuse_stream = "node_cut"
    task = asyncio.create_task(client.follow(lambda: 0, lambda: ups.append(1), lambda _: None, lambda _: None, refused))
    try:
        await until(lambda: ups)
        assert asked == ["node_cut"]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()


class Patient(random.Random):
    """Whoever waits for a draw waits for longer than a test."""

    def uniform(self, a: float, b: float) -> float:
        return 1000.0


async def test_a_token_is_spent_when_the_controller_answered(
    controller: FakeController, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut node does not show its used token again; a new one counts as used only once there was an answer."""
    file = tmp_path / "token"
    file.write_text(controller.token())
    base = {"node": "n1", "state_dir": tmp_path / "state", "join_token_file": file}
    membership = Membership(SimpleNamespace(**base), SimpleNamespace(), lambda _: None, lambda: 0)  # type: ignore[arg-type]
    await membership.identity.join(token_of(file, "n1"))
    attempts: list[str] = []
    answers: list[Exception | None] = [CallFailed("nobody"), None, JoinError("no")]

    async def join(given: Token) -> None:
        attempts.append(given.secret)
        if (answer := answers.pop(0)) is not None:
            raise answer

    monkeypatch.setattr(membership.identity, "join", join)
    assert not await membership._not_let_in("node_cut") and not attempts
    file.write_text(token(secret="new"))
    assert not await membership._not_let_in("node_cut")
    assert await membership._not_let_in("node_cut")
    assert not await membership._not_let_in("node_cut") and attempts == ["new", "new"]
    file.write_text(token(secret="bad"))
    assert not await membership._not_let_in("node_cut") and not await membership._not_let_in("node_cut")
    assert attempts == ["new", "new", "bad"]


async def test_renewal_makes_a_new_key(member: NodeIdentity, tmp_path: Path) -> None:
    before = (tmp_path / "state/node.key").read_bytes()
    client = ControllerClient(list(member.controllers), member.context)
    try:
        await member.renew(client)
        assert (tmp_path / "state/node.key").read_bytes() != before
        assert NodeIdentity("n1", tmp_path / "state").load()
        assert await client.register(SPEC) > 0, "the new certificate works"
    finally:
        await client.close()


async def test_a_renewal_brings_no_old_roots_back(member: NodeIdentity, controller: FakeController, tmp_path: Path) -> None:
    """Its answer may have been under way when the stream told the mesh's new ones, and the stream tells them once."""
    roots = controller.authority.root + Authority().root
    member.trust((controller.authority.root, roots.removeprefix(controller.authority.root)))
    client = ControllerClient(list(member.controllers), member.context)
    try:
        await member.renew(client)
    finally:
        await client.close()
    assert (tmp_path / "state/bundle.pem").read_text() == roots


async def test_roots_that_cannot_be_read_are_refused(member: NodeIdentity, tmp_path: Path) -> None:
    before = (tmp_path / "state/bundle.pem").read_text()
    member.trust(("nonsense",))
    assert (tmp_path / "state/bundle.pem").read_text() == before


async def test_an_ungranted_registration_is_a_refusal_with_its_reason(member: NodeIdentity, controller: FakeController) -> None:
    client = ControllerClient(list(member.controllers), member.context)
    controller.granted = set()
    try:
        with pytest.raises(CallRefused) as caught:
            await client.register(SPEC)
        assert caught.value.reason == "identity_not_granted"
        await controller.stop()
        with pytest.raises(CallFailed):
            await client.register(SPEC)
    finally:
        await client.close()


async def test_a_silent_stream_is_noticed_and_opened_anew(member: NodeIdentity, controller: FakeController) -> None:
    client = ControllerClient(list(member.controllers), member.context, silence_s=0.3)
    ups: list[int] = []
    downs: list[str] = []
    heard: list[object] = []
    controller.silent = True

    async def refused(reason: str) -> bool:
        downs.append(reason)
        return False

    task = asyncio.create_task(
        client.follow(lambda: 0, lambda: ups.append(1), heard.append, lambda error: downs.append(error), refused)
    )
    try:
        await until(lambda: len(downs) >= 2)
        assert "silent" in downs[0] and not heard
        controller.silent = False
        await until(lambda: heard)
        assert isinstance(heard[0], snapshot.Snapshot)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()
