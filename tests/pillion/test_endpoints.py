from __future__ import annotations

import json
from pathlib import Path

import pytest

from pillion.endpoints import Endpoints, discover
from pillion.errors import CliError
from tests.pillion.conftest import Cli


def lab_file(root: Path, name: str, *, mesh: bool = True, built: bool = True) -> None:
    folder = root / name
    folder.mkdir(parents=True)
    state = {
        "name": name,
        "mesh": mesh,
        "built": built,
        "controller": f"unix:///{name}/c",
        "nodes": [{"name": node, "agent": f"unix:///{name}/{node}"} for node in ("n1", "n2")],
    }
    (folder / "state.json").write_text(json.dumps(state))


def test_options_win_over_the_environment_and_labs(tmp_path: Path) -> None:
    lab_file(tmp_path, "demo")
    env = {"PILLION_CONTROLLER": "unix:///env", "PILLION_AGENT": "unix:///agent"}
    found = discover("https://c:1", None, None, env, tmp_path)
    assert (found.controller, dict(found.agents)) == ("https://c:1", {"": "unix:///agent"})
    assert discover(None, None, None, env, tmp_path).controller == "unix:///env"


def test_a_running_lab_is_found_and_demo_preferred(tmp_path: Path) -> None:
    lab_file(tmp_path, "other")
    assert discover(None, None, None, {}, tmp_path).controller == "unix:///other/c"
    lab_file(tmp_path, "demo")
    found = discover(None, None, None, {}, tmp_path)
    assert found.controller == "unix:///demo/c" and found.agent_of("n2") == "unix:///demo/n2"
    assert discover(None, None, "other", {}, tmp_path).controller == "unix:///other/c"


def test_several_labs_must_be_chosen_from(tmp_path: Path) -> None:
    lab_file(tmp_path, "one")
    lab_file(tmp_path, "two")
    with pytest.raises(CliError, match="2 labs") as error:
        discover(None, None, None, {}, tmp_path)
    assert "--lab one | two" in error.value.remedy


def test_labs_without_mesh_half_built_or_damaged_are_none(tmp_path: Path) -> None:
    lab_file(tmp_path, "plain", mesh=False)
    lab_file(tmp_path, "half", built=False)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "state.json").write_text("{")
    with pytest.raises(CliError, match="no controller"):
        Endpoints().need_controller()
    assert discover("unix:///c", None, None, {}, tmp_path).controller == "unix:///c"
    with pytest.raises(CliError, match="no lab 'plain'"):
        discover(None, None, "plain", {}, tmp_path)


@pytest.mark.parametrize(
    "url", ["http://c:1", "/run/c.sock", "unix://relative", "https://", "https://c:port", "https://c:99999", "https://[c"]
)
def test_addresses_that_are_none(url: str, tmp_path: Path) -> None:
    with pytest.raises(CliError, match="no address"):
        discover(url, None, None, {}, tmp_path)


def test_a_node_must_be_named_where_there_are_two() -> None:
    two = Endpoints(None, {"n1": "unix:///1", "n2": "unix:///2"})
    with pytest.raises(CliError, match="2 nodes"):
        two.agent_of(None)
    with pytest.raises(CliError, match="'n3'"):
        two.agent_of("n3")
    one = Endpoints(None, {"": "unix:///1"})
    assert one.agent_of(None) == "unix:///1"
    with pytest.raises(CliError) as told:
        one.agent_of("n1")
    assert told.value.remedy == "leave --node out: the one agent here is the node's own"


@pytest.mark.parametrize("option", ["--controller", "--agent"])
def test_a_typed_address_wins_over_a_lab_of_the_environment(cli: Cli, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """Else `--controller https://there delete …` would delete here."""
    monkeypatch.setenv("PILLION_LAB", "nowhere")
    command = ("get", "svc") if option == "--controller" else ("flows",)
    done = cli(option, "unix:///nowhere/a.sock", *command)
    assert done.code == 1 and "/nowhere/a.sock does not answer" in done.err, done.err
    both = cli(option, "unix:///nowhere/a.sock", "--lab", "nowhere", *command)
    assert both.code == 2 and "exclude each other" in both.err
