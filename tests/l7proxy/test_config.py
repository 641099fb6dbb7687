from __future__ import annotations

import msgspec
import pytest

from l7proxy.config import Config
from mesh import link
from mesh.link import LocalWorkload
from mesh.model import Operation, Protocol, Rule, Service, State, Workload, key_of
from mesh.snapshot import SnapshotError, digest
from tests.l7proxy.rig import NODE_NETNS, Mesh


def config(mesh: Mesh, *local: Workload) -> Config:
    return Config(mesh.state, revision=1, local=[LocalWorkload(key_of(item), NODE_NETNS, 1) for item in local])


def workload_of(mesh: Mesh, service: Service, number: int = 0) -> Workload:
    found = mesh.state[service.endpoints[number]]
    assert isinstance(found, Workload)
    return found


def test_nothing_is_known_before_the_first_update() -> None:
    empty = Config.empty()
    assert empty.destination("240.0.0.1", 80) is None
    assert empty.at_workload("Workload/shop/web-1", 80) is None
    assert not empty.known


def test_a_vip_a_workload_and_nothing() -> None:
    mesh = Mesh()
    web = mesh.service("web", [8080])
    here = workload_of(mesh, web)
    known = config(mesh, here)
    vip = known.destination(web.vips[0], 80)
    assert vip is not None and (vip.service, vip.mode, vip.endpoint) == (key_of(web), Protocol.HTTP, None)
    direct = known.destination("127.0.0.1", 8080)
    assert direct is not None and direct.endpoint is not None
    assert (direct.endpoint.key, direct.endpoint.local, direct.mode) == (key_of(here), True, Protocol.HTTP)
    assert known.destination(web.vips[0], 81) is None
    assert known.destination("127.0.0.1", 22) is None
    assert known.local_port("127.0.0.1", 8080) == here
    assert config(mesh).local_port("127.0.0.1", 8080) is None


def test_the_strictest_protocol_of_a_shared_port_wins() -> None:
    mesh = Mesh()
    one = mesh.service("one", [8080], Protocol.TCP)
    other = msgspec.structs.replace(mesh.service("two", [8080], Protocol.HTTP), endpoints=one.endpoints)
    mesh.items[-1] = other
    found = config(mesh).at_workload(one.endpoints[0], 8080)
    assert found is not None and found.mode is Protocol.HTTP


def test_an_l7_rule_makes_a_port_http() -> None:
    mesh = Mesh()
    db = mesh.service("db", [3306], Protocol.TCP)
    assert config(mesh).destination(db.vips[0], 80).mode is Protocol.TCP  # type: ignore[union-attr]
    mesh.deny("db", Rule(operations=(Operation(paths=("/x",)),)))
    assert config(mesh).destination(db.vips[0], 80).mode is Protocol.HTTP  # type: ignore[union-attr]
    assert config(mesh).at_workload(db.endpoints[0], 3306).mode is Protocol.HTTP  # type: ignore[union-attr]


def test_deltas_carry_the_digest_on() -> None:
    mesh = Mesh()
    web = mesh.service("web", [8080])
    known = config(mesh)
    removed = known.updated(link.Update(2, False, {}, (key_of(web),)), "n1")
    expected: State = {key: item for key, item in mesh.state.items() if key != key_of(web)}
    assert removed.digest == digest(expected) == digest(removed.state)
    assert removed.destination(web.vips[0], 80) is None
    assert known.destination(web.vips[0], 80) is not None  # the old one is what it was
    back = removed.updated(link.Update(3, False, {key_of(web): web}), "n1")
    assert back.digest == known.digest


def test_a_state_without_config_is_refused() -> None:
    with pytest.raises(SnapshotError):
        Config.empty().updated(link.Update(1, True, {}), "n1")
