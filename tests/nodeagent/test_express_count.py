"""Which name the program that corrects FIONREAD is compiled under: BCC attaches it by that."""

from __future__ import annotations

import pytest

from nodeagent.express_count import NAMES, names


@pytest.mark.parametrize(
    ("version", "wanted"),
    [("0.26.0", NAMES[:1]), ("0.29.1", NAMES[1:]), ("0.31.0+ds", NAMES[1:]), ("1.0", NAMES[1:]), ("", NAMES)],
    ids=["Debian 12", "Ubuntu 24.04", "Debian 13", "a later one", "untold"],
)
def test_a_name_that_ends_the_process_is_not_tried(version: str, wanted: tuple[str, ...]) -> None:
    assert names(version) == wanted
