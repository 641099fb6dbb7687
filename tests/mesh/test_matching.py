import re
import time

import pytest

from mesh.matching import check_regex, compile_blocks, compile_regex, host_name, in_blocks


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("Web.Shop.Mesh:80", "web.shop.mesh"),
        ("a.", "a"),
        ("[::1]:80", "[::1]"),
        ("[::1]", "[::1]"),
        ("[", "["),
        ("", ""),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_host_names(host, name):
    assert host_name(host) == name


@pytest.mark.parametrize("pattern", ["/v[0-9]+/.*", "/(a|b)/[^/]+", "(?:x|y)*", "/a{2,3}", r"/\d+", "[)]+", r"\(a+\)+"])
def test_plain_patterns_are_taken(pattern):
    check_regex(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+",
        "(a*)*b",
        "((a+)b)*",
        "(?:a+)+",
        "(a|b+){2,}",
        "(a)\\1",
        "(?=a)",
        "(?P<x>a)",
        "(?i)a",
        "(",
        "[",
        "a" * 300,
        "a*a*a*a*a*",
        "(a{2,}){3,}",
    ],
)
def test_patterns_that_could_run_away_are_refused(pattern):
    with pytest.raises(ValueError, match=r"."):
        check_regex(pattern)


@pytest.mark.parametrize(
    ("pattern", "letter", "count"),
    [
        ("/.*a.*b", "a", 2000),
        ("/.*/.*/.*/x", "/", 1900),
        ("/(?:a|a)*b", "a", 26),
        ("/(?:a?a)*b", "a", 36),
        ("/(?:a|aa)+b", "a", 36),
        ("/.*", "a", 100_000),
    ],
)
def test_a_hostile_path_takes_no_time(pattern, letter, count):
    test = compile_regex(pattern)
    start = time.process_time()
    assert not test("/" + letter * count)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("pattern", [r"/(?:a|b)*\b", r"/.*\b.*", "/(?:[a-z]{200}|[0-9]{200})"])
def test_a_pattern_that_can_not_be_walked_is_refused(pattern):
    with pytest.raises(ValueError, match="simpler"):
        check_regex(pattern)


def test_the_whole_text_matches():
    assert compile_regex("/a|/b")("/b")
    assert not compile_regex("/a")("/ab")
    assert re.search("/a", "/ab")


def test_a_mapped_address_is_an_ipv4_address():
    blocks = compile_blocks(("10.0.0.0/8", "fd00::/8"))
    assert in_blocks(blocks, "::ffff:10.1.2.3")
    assert in_blocks(blocks, "fd00::1")
    assert not in_blocks(blocks, "2001:db8::1")
