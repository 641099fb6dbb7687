"""A little of `make fuzz` in every test run, and that its judges can tell when they should."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import driver, manifests, messages
from fuzz.http1 import reading
from fuzz.http1.nginx import Nginx
from fuzz.http1.requests import HttpRequests
from fuzz.minimise import minimise
from fuzz.targets import NAMES, make
from fuzz.worker import cases, judge
from l7proxy.http1 import head
from mesh import link
from mesh.model import Item
from mesh.resources import KINDS, load

CASES = {
    "http1-requests": 6000,
    "http1-responses": 6000,
    "hbone": 1500,
    "dns": 1500,
    "link": 3000,
    "stream": 3000,
    "resources": 600,
}


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> object:
    with Nginx(tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.mark.parametrize("name", NAMES)
def test_cases(name: str, nginx: Nginx) -> None:
    target = make(name, nginx)
    for case in islice(cases(target, "test", []), CASES[name]):
        finding = judge(target, case)[1]
        assert finding is None, f"{finding.what}: {finding.detail}\n{case!r}"
    assert not target.drain()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([b"GET / HTTP/1.1\r\n", b"Host: h\r\n", b"Content-Length: 3\r\n", b"\r\n", b"\n", b"abc", b"0", b" "])
    )
)
def test_any_order_of_lines(pieces: list[bytes]) -> None:
    finding = judge(HttpRequests(), b"".join(pieces), deep=True)[1]
    assert finding is None, finding


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(NAMES), st.binary(max_size=300))
def test_any_bytes(name: str, data: bytes) -> None:
    finding = judge(make(name, None), data, deep=True)[1]
    assert finding is None, finding


def _host_keeps_its_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_without_port", lambda host: host.partition(":")[0])


def _length_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_length", lambda value: 0)


def _forwards_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading.Requests, "_to_upstream", lambda self, data: self.exchanges[-1][1].append(data[1:]))


@pytest.mark.parametrize(
    ("fault", "case", "what"),
    [
        (_host_keeps_its_dot, b"GET / HTTP/1.1\r\nHost: h.\r\n\r\n", "nginx another host"),
        (_length_ignored, b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 18\r\n\r\nGET / HTTP/1.1\r\n\r\n", "httptools"),
        (_length_ignored, b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\n", "httptools another body"),
        (_forwards_less, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", "pillion forwards other bytes than came"),
    ],
)
def test_a_fault_is_found(
    fault: Callable[[pytest.MonkeyPatch], None], case: bytes, what: str, nginx: Nginx, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    finding = judge(HttpRequests(nginx), case, deep=True)[1]
    assert finding is not None and finding.what.startswith(what)


def test_nothing_that_is_said_is_left_out() -> None:
    """What the product learned to say since is in the grammars too."""
    assert {type(message) for message in messages.MESSAGES} == set(get_args(link.Message))
    assert {type(item) for item in messages.STATE.values()} == set(get_args(Item))
    assert {document["kind"] for document in manifests.DOCUMENTS} == set(KINDS)
    for document in manifests.DOCUMENTS:
        assert load(yaml.safe_dump(document))


def test_minimise() -> None:
    assert minimise(b"some long text with a needle, and more of it", lambda case: b"needle" in case) == b"needle"


def test_a_run_shares_out_its_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert driver.run("link", 2000, 30.0, 2, "test", keep=False) == 0
    assert "link: 2,000 cases" in capsys.readouterr().out


def test_a_run_stores_what_it_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(driver, "CORPUS", tmp_path)
    monkeypatch.setattr(head, "_length", lambda value: 0)  # the workers are forked with it
    assert driver.run("http1-responses", 1000, 30.0, 1, "test", keep=True) > 0
    stored = list((tmp_path / "http1-responses").iterdir())
    assert stored and all(path.stat().st_size < 1000 for path in stored)
    assert "disagreement" in capsys.readouterr().out
