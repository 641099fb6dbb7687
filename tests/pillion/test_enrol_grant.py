"""A workload that no NodeGrant gives its node: the documented way has one, and who forgot it is told at once."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from mesh.resources import NodeGrant, load
from pillion import awaiting, enrol, enrol_files
from pillion.context import chosen
from pillion.errors import CliError
from tests.deploy import test_enrol as of_files
from tests.pillion.conftest import Fake, serve

HOSTS = Path(__file__).parents[2] / "docs/hosts.md"
host = of_files.host
UNGRANTED = "identity_not_granted: node n1 is not granted shop/web; an operator adds it to a NodeGrant of that node"


class Agent(dict[str, tuple[int, Any]]):
    """Answers of an agent: ``said`` of the workload in turn, the last one again and again; None where it does not know it."""

    def __init__(self, *said: str | None) -> None:
        self.said = list(said)

    def get(self, asked: str, default: Any = None) -> Any:
        detail = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        entries = of_files.yaml.safe_load(enrol_files.WORKLOADS.read_text())["workloads"]
        cgroup = enrol_files.WORKLOADS.parent
        row = {"namespace": "shop", "name": "web-n1", "cgroup": str(cgroup), "cgroup_id": cgroup.stat().st_ino}
        rows = [{**row, "detail": detail}] if entries and detail is not None else []
        return (200, {"node": "n1", "workloads": rows})


@pytest.fixture
def asked(host: of_files.Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`asked(…)`: the agent says that, and the service is enrolled."""
    monkeypatch.setattr(enrol, "await_workload", awaiting.await_workload)
    monkeypatch.setattr(awaiting, "LOOK_S", 0.01)
    servers = []

    def enrols(*said: str | None) -> None:
        agent: Fake
        agent, server = serve(tmp_path / f"b{len(servers)}.sock")
        servers.append(server)
        agent.answers = Agent(*said)
        chosen.agent = agent.url
        of_files.into()

    yield enrols
    for server in servers:
        server.shutdown()
        server.server_close()


def words_of_the_first_block() -> list[list[str]]:
    block = HOSTS.read_text().split("\n\n    ", 1)[1].split("\n\n", 1)[0]
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def test_the_first_block_grants_what_it_enrols() -> None:
    lines = words_of_the_first_block()
    (enrolled,) = (line for line in lines if line[:2] == ["pillion", "enrol"])
    (joined,) = (line for line in lines if "--token" in line)
    grants = [resource for line in lines if line[0] == "echo" for resource in load(line[1])]
    assert [line[2:] for line in lines if line[0] == "echo"] == [["|", "pillion", "apply", "-f", "-"]]
    (grant,) = (resource for resource in grants if isinstance(resource, NodeGrant))
    assert grant.spec.node == joined[joined.index("--name") + 1]
    account = enrolled[enrolled.index("--as") + 1]
    assert {account, account.partition("/")[0] + "/*"} & set(grant.spec.service_accounts)


def test_a_refusal_is_told_at_once_with_the_grant(asked: Any) -> None:
    began = time.monotonic()
    with pytest.raises(CliError) as told:
        asked("not registered yet", "not registered yet", UNGRANTED)
    assert time.monotonic() - began < awaiting.ASKED_AGAIN_S / 2
    assert "node n1 is not granted shop/web" in told.value.what
    (grant,) = load(told.value.remedy.split("echo '")[1].split("'")[0])
    assert isinstance(grant, NodeGrant)
    assert (grant.spec.node, grant.spec.service_accounts) == ("n1", ["shop/web"])
    assert told.value.remedy.endswith("then repeat this, or undo it with: pillion withdraw web.service")


def test_a_refusal_of_before_the_grant_is_no_answer(asked: Any) -> None:
    """The agent knows the old answer until it asks again."""
    with pytest.raises(CliError):
        asked(UNGRANTED)
    asked(*[UNGRANTED] * 20, "waiting for the controller's state", "")


def test_a_refusal_that_stands_is_told(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CliError):
        asked(UNGRANTED)
    monkeypatch.setattr(enrol, "ASKED_AGAIN_S", 0.5)
    with pytest.raises(CliError, match="is not granted"):
        asked(UNGRANTED)


def test_other_refusals_may_pass(asked: Any) -> None:
    """A port of a workload that is about to go, for one."""
    asked("not registered yet", *["port_taken: another has port 8080"] * 20, "")


def test_what_it_waits_for_is_said_once(asked: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(awaiting, "SILENT_S", 0.0)
    asked(*["not registered yet"] * 5, *["port_taken: another has port 8080"] * 5, "")
    first, second = (line for line in capsys.readouterr().err.splitlines() if "waits up to" in line)
    assert re.search(r"up to 7\d s for shop/web-n1 to be enforced: not registered yet", first)
    assert second.endswith("port_taken: another has port 8080")


def test_a_short_wait_says_nothing(asked: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(awaiting, "SILENT_S", 60.0)
    asked("not registered yet", "")
    assert "waits" not in capsys.readouterr().err
