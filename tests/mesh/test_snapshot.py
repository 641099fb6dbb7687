import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import snapshot
from mesh.model import key_of
from mesh.snapshot import Ack, Delta, Nack, Ping, Pong, Ready, SnapshotError, Versioned, digest, make_delta
from tests.mesh.build import identity, service, state, workload

item = st.one_of(
    st.builds(lambda name, number: workload(name, number=number), st.sampled_from("abcde"), st.integers(300, 305)),
    st.builds(lambda name, number: service(name, number=number), st.sampled_from("abcde"), st.integers(300, 305)),
    st.builds(lambda name, number: identity("shop", name, number), st.sampled_from("abcde"), st.integers(300, 305)),
)
states = st.lists(item, max_size=8).map(lambda items: {key_of(item): item for item in items})


@given(states, st.randoms(use_true_random=False))
def test_the_digest_knows_no_order(items, random):
    keys = list(items)
    random.shuffle(keys)
    assert digest({key: items[key] for key in keys}) == digest(items)


@given(states, states)
def test_the_digest_tells_states_apart(old, new):
    assert (digest(old) == digest(new)) == (old == new)


@given(states, states)
def test_a_delta_leads_from_one_state_to_the_other(old, new):
    before = dict(old)
    delta = make_delta(old, new, 3, 4)
    assert Versioned.of(old, 3).apply(delta) == Versioned.of(new, 4)
    assert old == before


@given(states, states)
def test_the_digest_follows_a_delta(old, new):
    versioned, delta = Versioned.of(old, 1).next(new, 2)
    assert versioned == Versioned.of(new, 2)
    assert Versioned.of(old, 1).apply(delta) == versioned
    assert delta == make_delta(old, new, 1, 2)


@given(states, states)
def test_frames_lead_back(old, new):
    for message in (Versioned.of(old, 7).snapshot(), make_delta(old, new, 7, 8), Ping()):
        assert snapshot.decode_server(snapshot.encode(message)) == message
    for message in (Ack(7, "ab"), Nack(7, "no"), Ready(True, "x"), Pong()):
        assert snapshot.decode_agent(snapshot.encode(message)) == message
    assert snapshot.decode_state(snapshot.encode_state(old)) == old


def test_the_wire_form_is_the_contracts():
    delta = msgspec.json.decode(snapshot.encode(Delta(1, 2, "ab")))
    assert delta == {"type": "delta", "from": 1, "revision": 2, "digest": "ab", "put": {}, "delete": []}
    assert msgspec.json.decode(snapshot.encode(Ping())) == {"type": "ping"}


OLD, NEW = state(workload("a")), state(workload("b"))
GOOD = make_delta(OLD, NEW, 1, 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"from_revision": 2}, "starts at revision 2"),
        ({"revision": 0}, "goes back"),
        ({"digest": "00" * 32}, "another digest"),
        ({"delete": ()}, "another digest"),
        ({"delete": ("Workload/shop/none",)}, "not there"),
        ({"delete": ("Workload/shop/a", "Workload/shop/a")}, "twice"),
        ({"put": {"Workload/shop/x": workload("b")}}, "belongs under"),
        ({"put": {"Workload/shop/a": workload("a")}}, "twice"),
    ],
)
def test_a_delta_that_does_not_follow_changes_nothing(change, told):
    before = dict(OLD)
    with pytest.raises(SnapshotError, match=told):
        Versioned.of(OLD, 1).apply(msgspec.structs.replace(GOOD, **change))
    assert before == OLD


def test_a_corrupt_snapshot_is_refused():
    good = Versioned.of(OLD, 1).snapshot()
    assert Versioned.from_snapshot(good).state == OLD
    with pytest.raises(SnapshotError, match="corrupt"):
        Versioned.from_snapshot(msgspec.structs.replace(good, items=NEW))
    with pytest.raises(SnapshotError, match="belongs under"):
        Versioned.from_snapshot(msgspec.structs.replace(good, items={"Workload/shop/z": workload("a")}))


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"type":"delta"}', b'{"type":"ack","revision":1,"digest":"x"}', b"\xff", b"[" * 5000]
)
def test_what_is_no_frame_is_refused(data):
    with pytest.raises(SnapshotError):
        snapshot.decode_server(data)


def test_unknown_fields_are_refused():
    with pytest.raises(SnapshotError):
        snapshot.decode_agent(b'{"type":"pong","more":1}')


def test_without_a_config_nothing_is_decided():
    with pytest.raises(SnapshotError, match="Config//mesh"):
        snapshot.config_of({})
