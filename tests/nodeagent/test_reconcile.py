"""The reconcile core as a dialogue: what happens >> what the agent does about it."""

from __future__ import annotations

import msgspec
import pytest

from mesh import link, snapshot
from mesh.model import CONFIG_KEY, Action, Config, Identity, Policy, Service, State, Workload
from mesh.snapshot import Versioned, make_delta, make_snapshot
from nodeagent import reconcile_events as ev
from nodeagent.reconcile import REPAIR_EVERY_S, Reconciler
from nodeagent.states import generation_changes
from nodeagent.worker_views import WORKER_ACK_S
from nodeagent.workloads import Spec

WEB = "spiffe://mesh.local/ns/shop/sa/web"
SPEC = Spec(name="web-1", namespace="shop", service_account="web", cgroup="/cg/web", addresses=("10.1.0.1",))
KEY = SPEC.key
PLACED = {KEY: ev.Placed(SPEC, 77, 88)}
ITEM = Workload(id=300, name="web-1", namespace="shop", node="n1", identity=256, spiffe=WEB, addresses=("10.1.0.1",))
BASE: State = {CONFIG_KEY: Config(trust_domain="mesh.local")}
STATE: State = {**BASE, f"Identity//{WEB}": Identity(256, WEB), KEY: ITEM}
DENY = Policy(name="no", namespace="shop", action=Action.DENY)
DENIED: State = {**STATE, "Policy/shop/no": DENY}


class Play:
    """Runs the core; answers for the world where a test does not."""

    def __init__(self) -> None:
        self.core = Reconciler("n1")
        self.now = 100.0
        self.said: list[ev.Command] = []

    def __call__(self, *events: ev.Event, later: float = 0.0) -> list[ev.Command]:
        self.now += later
        self.said = [command for event in events for command in self.core.handle(event, self.now)]
        return self.said

    def one(self, kind: type[ev.Command]) -> ev.Command:
        found = [command for command in self.said if isinstance(command, kind)]
        assert len(found) == 1, self.said
        return found[0]

    def order(self) -> ev.ApplyKernel:
        command = self.one(ev.ApplyKernel)
        assert isinstance(command, ev.ApplyKernel)
        return command

    def kinds(self) -> list[str]:
        return [type(command).__name__ for command in self.said]

    def sent(self) -> list[snapshot.AgentMessage]:
        return [command.message for command in self.said if isinstance(command, ev.Send)]

    def acks(self) -> list[snapshot.AgentMessage]:
        return [message for message in self.sent() if isinstance(message, (snapshot.Ack, snapshot.Nack))]

    def started(self) -> Play:
        self(ev.SpecsChanged(PLACED), ev.Started({"connect4": True}), ev.ControllerUp())
        return self

    def running(self, state: State = STATE, revision: int = 7, workers: tuple[str, ...] = ()) -> Play:
        """A node that enforces ``state``."""
        self.started()
        for worker in workers:
            self(ev.WorkerUp(worker))
        self(ev.Received(make_snapshot(state, revision)))
        self.finish(workers)
        return self

    def applied(self, order: ev.ApplyKernel | None = None) -> list[ev.Command]:
        order = order or self.order()
        keys = frozenset(entry.spec.key for entry in order.enrolled)
        return self(ev.KernelApplied(order.token, f"kernel{order.token}", keys, {}))

    def finish(self, workers: tuple[str, ...] = ()) -> list[ev.Command]:
        """From ApplyKernel to the end of the rollout."""
        order = self.order()
        heard = self.applied(order)
        updates = {command.worker: command.update for command in heard if isinstance(command, ev.UpdateWorker)}
        for worker in workers:
            heard = heard + self(ev.WorkerAcked(worker, updates[worker].revision, self.core.enforced.digest))
        if any(isinstance(command, ev.EndDenied) for command in heard):
            heard = heard + self(ev.Ended(order.token, 0))
        self.said = heard + self(ev.Persisted(order.token))
        return self.said


@pytest.fixture
def play() -> Play:
    return Play()


def test_listeners_opened_at_a_second_try_are_handed_out(play: Play) -> None:
    """Nothing else changed: the worker has the state, and would not be told."""
    play.started()
    play(ev.WorkerUp("w0"), ev.Received(make_snapshot(STATE, 7)))
    order = play.order()
    play(ev.KernelApplied(order.token, "kernel", frozenset(), {KEY: "a stranger has the port"}))
    play(ev.WorkerAcked("w0", 7, play.core.enforced.digest), ev.Ended(order.token, 0), ev.Persisted(order.token))
    play(ev.Tick(), later=REPAIR_EVERY_S)
    play.applied()
    assert ev.EquipWorker("w0") in play.said


def test_nothing_is_enforced_before_the_programs_are_loaded(play: Play) -> None:
    play(ev.ControllerUp(), ev.Received(make_snapshot(STATE, 7)))
    assert "ApplyKernel" not in play.kinds()
    play(ev.Started({"connect4": True}))
    assert play.order().revision == 7


def test_a_revision_is_acknowledged_last(play: Play) -> None:
    play.started()
    play(ev.WorkerUp("w0"), ev.WorkerUp("w1"))
    play(ev.Received(make_snapshot(STATE, 7)))
    order = play.order()
    assert order.enrolled == (ev.Enrolled(SPEC, 77, 88, ITEM),)
    assert not play.acks()

    play.applied(order)
    assert play.kinds().count("UpdateWorker") == 2 and "Persist" in play.kinds() and "EndDenied" not in play.kinds()
    play(ev.Persisted(order.token), ev.WorkerAcked("w0", 7, play.core.enforced.digest))
    assert "EndDenied" not in play.kinds() and not play.acks()
    play(ev.WorkerAcked("w1", 7, play.core.enforced.digest))
    assert "EndDenied" in play.kinds() and not play.acks()
    play(ev.Ended(order.token, 3))
    assert play.acks() == [snapshot.Ack(7, snapshot.digest(STATE))]
    assert play.core.counts.ended == 3


def test_a_delta_is_told_to_workers_as_one(play: Play) -> None:
    play.running(workers=("w0",))
    play(ev.Received(make_delta(STATE, DENIED, 7, 8)))
    order = play.order()
    play.applied(order)
    update = play.one(ev.UpdateWorker)
    assert isinstance(update, ev.UpdateWorker)
    assert update.update == link.Update(
        8, False, {"Policy/shop/no": DENY}, (), (link.LocalWorkload(KEY, 77, 88),), order.generation
    )


def test_a_change_of_policy_bumps_the_generation_a_new_service_does_not(play: Play) -> None:
    play.running()
    before = play.core.generation
    served: State = {**STATE, "Service/shop/web": Service(id=400, name="web", namespace="shop")}
    play(ev.Received(make_delta(STATE, served, 7, 8)))
    assert play.order().generation == before
    play.finish()
    assert "EndDenied" not in play.kinds()
    assert play.acks()
    play(ev.Received(make_delta(served, {**served, "Policy/shop/no": DENY}, 8, 9)))
    assert play.order().generation == before + 1


def test_a_worker_that_comes_later_gets_the_state_before_anything_else(play: Play) -> None:
    play.running()
    play(ev.WorkerUp("w0"))
    assert [kind for kind in play.kinds() if kind != "Send"] == ["UpdateWorker"]
    update = play.one(ev.UpdateWorker)
    assert isinstance(update, ev.UpdateWorker) and update.update.full and update.update.put == STATE
    play(ev.WorkerAcked("w0", 7, snapshot.digest(STATE)))
    assert ev.EquipWorker("w0") in play.said


def test_no_worker_holds_up_no_rollout(play: Play) -> None:
    play.running()
    assert play.acks() == [snapshot.Ack(7, snapshot.digest(STATE))]


def test_a_silent_worker_is_dropped_told_and_keeps_the_ack_back(play: Play) -> None:
    play.running(workers=("w0", "w1"))
    play(ev.Received(make_delta(STATE, DENIED, 7, 8)))
    order = play.order()
    play.applied(order)
    play(ev.Persisted(order.token), ev.WorkerAcked("w0", 8, play.core.enforced.digest))
    play(ev.Tick(), later=WORKER_ACK_S + 0.1)
    dropped = play.one(ev.DropWorker)
    assert isinstance(dropped, ev.DropWorker) and dropped.worker == "w1"
    assert "EndDenied" in play.kinds(), "the rest of the node does not wait"
    assert [type(message) for message in play.acks()] == [snapshot.Nack]
    play(ev.Ended(order.token, 0))
    assert not play.acks()
    # The next revision still goes through, and is not acknowledged either
    assert not play.core.readiness.ready and "w1" in play.core.readiness.detail

    play(ev.WorkerDown("w1"), ev.WorkerUp("w1"), ev.WorkerAcked("w1", 8, play.core.enforced.digest))
    assert play.acks() == [snapshot.Ack(8, snapshot.digest(DENIED))]


def test_a_worker_that_is_gone_holds_nothing_up(play: Play) -> None:
    play.running(workers=("w0",))
    play(ev.Received(make_delta(STATE, DENIED, 7, 8)))
    order = play.order()
    play.applied(order)
    play(ev.Persisted(order.token), ev.WorkerDown("w0", gone=True))
    assert "EndDenied" in play.kinds()
    play(ev.Ended(order.token, 0))
    assert play.acks() == [snapshot.Ack(8, snapshot.digest(DENIED))]


def test_a_worker_with_another_digest_is_sent_everything_then_dropped(play: Play) -> None:
    play.running()
    play(ev.WorkerUp("w0"), ev.WorkerAcked("w0", 7, "0" * 64))
    update = [c for c in play.said if isinstance(c, ev.UpdateWorker)][-1]
    assert update.update.full
    play(ev.WorkerAcked("w0", 7, "0" * 64))
    assert "DropWorker" in play.kinds()
    assert play.core.workers.counts["wrong_state"] == 2


def test_what_arrives_meanwhile_waits_and_only_the_newest_counts(play: Play) -> None:
    play.running()
    third: State = {**DENIED, "Service/shop/web": Service(id=400, name="web", namespace="shop")}
    play(ev.Received(make_delta(STATE, DENIED, 7, 8)))
    first = play.order()
    play(ev.Received(make_delta(DENIED, STATE, 8, 9)), ev.Received(make_delta(STATE, third, 9, 10)))
    assert "ApplyKernel" not in play.kinds()
    play.applied(first)
    play(ev.Ended(first.token, 0), ev.Persisted(first.token))
    assert play.acks() == [snapshot.Ack(8, snapshot.digest(DENIED))]
    assert play.order().revision == 10
    play.finish()
    assert play.acks() == [snapshot.Ack(10, snapshot.digest(third))]


def test_a_corrupt_snapshot_is_refused_and_counted_and_the_old_state_stands(play: Play) -> None:
    play.running()
    bad = msgspec.structs.replace(make_snapshot(DENIED, 8), digest="0" * 64)
    play(ev.Received(bad))
    assert [type(message) for message in play.acks()] == [snapshot.Nack]
    assert "ApplyKernel" not in play.kinds()
    assert play.core.intake.corrupt == 1 and play.core.received.revision == 7
    play(ev.Garbled("not a frame"), ev.Received(bad))
    assert "Reconnect" in play.kinds(), "three in a row: perhaps the stream is at fault"
    play(ev.Received(make_snapshot(DENIED, 8)))
    assert play.order().revision == 8


@pytest.mark.parametrize(
    "delta",
    [
        make_delta(DENIED, STATE, 6, 8),  # starts elsewhere
        make_delta(DENIED, STATE, 7, 8),  # deletes what is not there
        msgspec.structs.replace(make_delta(STATE, DENIED, 7, 8), digest="1" * 64),
        snapshot.Delta(7, 8, snapshot.digest(STATE), {"Policy/shop/other": DENY}),  # under a wrong key
    ],
)
def test_a_delta_that_does_not_follow_changes_nothing(play: Play, delta: snapshot.Delta) -> None:
    play.running()
    play(ev.Received(delta))
    assert [type(message) for message in play.acks()] == [snapshot.Nack]
    assert play.core.received.state == STATE and "ApplyKernel" not in play.kinds()


@pytest.mark.parametrize("lost", ["gone", "late"])
def test_an_ordinary_change_hides_no_worker_that_is_lost(play: Play, lost: str) -> None:
    play.running(workers=("w0",))
    play(ev.SvidsChanged(frozenset({WEB}), {}))
    assert play.core.readiness.ready, play.core.readiness
    play(ev.Received(make_delta(STATE, DENIED, 7, 8)))
    order = play.order()
    assert play.core.readiness.ready, "an ordinary change makes no node unready"
    if lost == "gone":
        play(ev.WorkerDown("w0", gone=True))
    else:
        play.applied(order)
        play(ev.Tick(), later=WORKER_ACK_S + 0.1)
    assert not play.core.readiness.ready, play.core.readiness


def test_a_full_map_keeps_the_old_state_and_is_tried_again(play: Play) -> None:
    play.running(workers=("w0",))
    play(ev.Received(make_delta(STATE, DENIED, 7, 8)))
    play(ev.KernelFailed(play.order().token, "map policy is full"))
    assert play.acks() == [snapshot.Nack(8, "map policy is full")]
    assert play.core.enforced.state == STATE and "UpdateWorker" not in play.kinds()
    assert not play.core.readiness.ready
    play(ev.Tick())
    assert "ApplyKernel" not in play.kinds()
    play(ev.Tick(), later=REPAIR_EVERY_S)
    assert play.order().revision == 8
    play.finish(("w0",))
    assert play.acks() == [snapshot.Ack(8, snapshot.digest(DENIED))]


def test_no_ack_for_a_state_that_could_not_be_kept(play: Play) -> None:
    play.running()
    play(ev.Received(make_delta(STATE, DENIED, 7, 8)))
    order = play.order()
    play.applied(order)
    play(ev.Ended(order.token, 0), ev.Persisted(order.token, "No space left on device"))
    assert [type(message) for message in play.acks()] == [snapshot.Nack]
    play(ev.Tick())
    again = play.one(ev.Persist)
    assert isinstance(again, ev.Persist)
    play(ev.Persisted(again.token))
    assert play.acks() == [snapshot.Ack(8, snapshot.digest(DENIED))]


def test_a_restart_without_a_controller_enforces_what_it_kept(play: Play) -> None:
    play(ev.Restored(Versioned.of(STATE, 7), 5))
    play(ev.SpecsChanged(PLACED), ev.Started({"connect4": True}))
    order = play.order()
    assert order.enrolled and order.generation == 6 and order.revision == 7
    play.finish()
    play(ev.SvidsChanged(frozenset({WEB})), ev.WorkerUp("w0"), ev.WorkerAcked("w0", 7, snapshot.digest(STATE)))
    assert play.core.readiness.ready, play.core.readiness
    assert play.core.resume == 7
    play(ev.ControllerUp())
    assert snapshot.Ack(7, snapshot.digest(STATE)) in play.sent()


def test_a_stream_resumes_only_from_what_is_enforced(play: Play) -> None:
    play.running()
    assert play.core.resume == 7
    play(ev.Received(make_delta(STATE, DENIED, 7, 8)))
    assert play.core.resume == 0


def test_a_workload_is_registered_then_enrolled_when_the_state_has_it(play: Play) -> None:
    play.started()
    play(ev.Received(make_snapshot(BASE, 3)))
    assert not play.order().enrolled
    play.finish()
    play(ev.Tick())
    assert ev.Register(SPEC) in play.said
    play(ev.Tick(), later=1.0)
    assert ev.Register(SPEC) not in play.said, "one answer is waited for"
    play(ev.Registered(SPEC, 4))
    assert play.core.lacks(KEY) == "waiting for the controller's state"
    play(ev.Received(make_delta(BASE, STATE, 3, 4)))
    assert play.order().enrolled
    assert play.one(ev.WantSvids) == ev.WantSvids(frozenset({WEB}))
    play.finish()
    assert "certificate" in play.core.lacks(KEY)
    play(ev.SvidsChanged(frozenset({WEB})))
    assert play.core.lacks(KEY) == ""


def test_a_refused_workload_is_never_enrolled_counted_and_asked_for_again(play: Play) -> None:
    play.running()
    play(ev.Tick())
    assert ev.Register(SPEC) in play.said
    play(ev.RegisterRefused(SPEC, "identity_not_granted", "ask an operator"))
    assert play.order().enrolled == (), "an older state may still have it"
    assert play.core.roster.refused == {"identity_not_granted": 1}
    play.finish()
    assert "identity_not_granted" in play.core.readiness.detail
    assert play.one(ev.WantSvids) if "WantSvids" in play.kinds() else True
    play(ev.Tick(), later=10.0)
    assert ev.Register(SPEC) in play.said
    play(ev.Registered(SPEC, 7))
    assert play.order().enrolled


@pytest.mark.parametrize(
    "item",
    [
        msgspec.structs.replace(ITEM, node="n2"),
        msgspec.structs.replace(ITEM, spiffe="spiffe://mesh.local/ns/shop/sa/other"),
        msgspec.structs.replace(ITEM, addresses=("10.9.9.9",)),
    ],
)
def test_only_what_the_state_says_of_this_node_is_enrolled(play: Play, item: Workload) -> None:
    play.started()
    play(ev.Received(make_snapshot({**STATE, KEY: item}, 7)))
    assert play.order().enrolled == ()


def test_a_workload_that_leaves_is_unregistered_and_its_connections_are_judged(play: Play) -> None:
    play.running()
    play(ev.Tick(), ev.Registered(SPEC, 7))
    before = play.core.generation
    play(ev.SpecsChanged({}))
    assert play.order().generation == before + 1 and not play.order().enrolled
    play.finish()
    play(ev.Tick())
    assert ev.Unregister(KEY) in play.said
    play(ev.Unregistered(KEY, "no answer"), ev.Tick())
    assert ev.Unregister(KEY) in play.said
    play(ev.Unregistered(KEY), ev.Tick())
    assert "Unregister" not in play.kinds()


def test_a_restarted_agent_unregisters_nobody_before_it_knows_its_workloads(play: Play) -> None:
    play.core.roster.stale |= {KEY, "Workload/shop/gone"}
    play(ev.Restored(Versioned.of(STATE, 7), 5), ev.ControllerUp(), ev.Tick())
    assert "Unregister" not in play.kinds()
    play(ev.SpecsChanged({}, error="the file is not YAML"), ev.Tick())
    assert "Unregister" not in play.kinds()
    play(ev.SpecsChanged(PLACED), ev.Tick())
    assert [command for command in play.said if isinstance(command, ev.Unregister)] == [ev.Unregister("Workload/shop/gone")]


def test_a_vanished_netns_takes_only_its_workload_out(play: Play) -> None:
    other = msgspec.structs.replace(SPEC, name="web-2", cgroup="/cg/web2", addresses=("10.1.0.2",))
    item = msgspec.structs.replace(ITEM, name="web-2", id=301, addresses=("10.1.0.2",))
    play(ev.SpecsChanged({**PLACED, other.key: ev.Placed(other, 79, 89)}))
    play(ev.Started({"connect4": True}), ev.ControllerUp(), ev.Received(make_snapshot({**STATE, other.key: item}, 7)))
    play.finish()
    play(ev.SpecsChanged({**PLACED, other.key: ev.Placed(other, error="its netns is not there")}))
    assert [entry.spec for entry in play.order().enrolled] == [SPEC]
    assert "netns" in play.core.lacks(other.key)


def test_a_cut_node_serves_nothing_any_more(play: Play) -> None:
    play.running(workers=("w0",))
    cut: State = {**STATE, CONFIG_KEY: Config(trust_domain="mesh.local", revoked=("node:n1", "AB01"))}
    play(ev.Received(make_delta(STATE, cut, 7, 8)))
    assert ev.Revoke(frozenset({"ab01"})) in play.said
    assert ev.WantSvids(frozenset()) in play.said
    order = play.order()
    assert order.enrolled == () and set(order.state) == {CONFIG_KEY}
    play.finish(("w0",))
    assert play.acks() == [snapshot.Ack(8, snapshot.digest(cut))]
    assert not play.core.readiness.ready and "cut" in play.core.readiness.detail


def test_a_node_told_that_it_is_cut_keeps_to_it(play: Play) -> None:
    play.running()
    play(ev.ControllerDown(), ev.CutOff())
    order = play.order()
    assert order.enrolled == ()
    play.applied(order)
    persisted = play.one(ev.Persist)
    assert isinstance(persisted, ev.Persist)
    config = persisted.state.state[CONFIG_KEY]
    assert isinstance(config, Config) and "node:n1" in config.revoked
    play(ev.Ended(order.token, 0), ev.Persisted(order.token))
    assert play.core.resume == 0
    play(ev.ControllerUp(), ev.Received(make_snapshot(STATE, 9)))
    assert play.order().enrolled, "admitted again"


def test_repair_is_asked_for_and_drift_makes_the_node_unready(play: Play) -> None:
    play.running(workers=("w0",))
    play(ev.SvidsChanged(frozenset({WEB})))
    assert play.core.readiness.ready
    play(ev.Tick(), later=REPAIR_EVERY_S)
    assert ev.Repair() in play.said
    play(ev.Observed("somebody wrote", 4))
    assert play.order().revision == 7, "applied anew"
    assert play.core.counts.repaired == 4
    play.finish()
    assert play.core.readiness.ready


def test_certificates_reach_workers_that_have_their_state(play: Play) -> None:
    play.running(workers=("w0",))
    play(ev.WorkerUp("w1"), ev.SvidsChanged(frozenset({WEB})))
    assert ev.EquipWorker("w0") in play.said and ev.EquipWorker("w1") not in play.said


def test_a_failed_end_of_connections_is_no_ack(play: Play) -> None:
    play.running()
    play(ev.Received(make_delta(STATE, DENIED, 7, 8)))
    order = play.order()
    play.applied(order)
    play(ev.Persisted(order.token), ev.Ended(order.token, 0, "netlink refused"))
    assert play.acks() == [snapshot.Nack(8, "netlink refused")]
    play(ev.Tick(), later=REPAIR_EVERY_S)
    play.finish()
    assert play.acks() == [snapshot.Ack(8, snapshot.digest(DENIED))]


def test_the_bundle_is_trusted_when_it_changes(play: Play) -> None:
    play.started()
    rooted: State = {CONFIG_KEY: Config(trust_domain="mesh.local", bundle=("PEM",))}
    play(ev.Received(make_snapshot(rooted, 3)))
    assert ev.TrustRoots(("PEM",)) in play.said


def test_a_state_without_config_is_refused(play: Play) -> None:
    play.running()
    play(ev.Received(make_snapshot({}, 8)))
    assert [type(message) for message in play.acks()] == [snapshot.Nack]
    assert play.core.enforced.state == STATE


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (STATE, STATE, False),
        (STATE, DENIED, True),
        (DENIED, STATE, True),
        (BASE, {**BASE, KEY: ITEM}, False),
        ({**BASE, KEY: ITEM}, BASE, True),
        ({**BASE, KEY: ITEM}, {**BASE, KEY: msgspec.structs.replace(ITEM, labels={"a": "b"})}, True),
        (BASE, {CONFIG_KEY: Config(trust_domain="mesh.local", default_action=Action.ALLOW)}, True),
    ],
)
def test_generation_changes(old: State, new: State, expected: bool) -> None:
    assert generation_changes(old, new) is expected
