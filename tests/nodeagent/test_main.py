"""The agent's command line."""

from __future__ import annotations

import pytest

from nodeagent import __main__ as agent

NEEDED = ("--node", "n1", "--state-dir", "/nowhere", "--run-dir", "/nowhere", "--cgroup", "/nowhere")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--controller", "http://192.0.2.1:15443"), "TLS alone"),
        (("--controller", "192.0.2.1:15443"), "https://host:port"),
        (("--address", "10.0.0.1", "--address", "10.0.0.2"), "two of one family"),
        (("--address", "somewhere"), "not an IP address"),
        (("--node", "N 1"), "DNS label"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    given: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_run", lambda _: pytest.fail("it would start"))
    with pytest.raises(SystemExit) as end:
        agent.main([*NEEDED, *given])
    assert end.value.code == 2 and told in capsys.readouterr().err
