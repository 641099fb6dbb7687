import pytest

from mesh.addresses import host_port, parse_host_port


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("[fd77::1]:65535", ("fd77::1", 65535)),
        ("[FD77:0::1]:080", ("fd77::1", 80)),
    ],
)
def test_a_way_and_back(text, found):
    assert parse_host_port(text) == found
    assert parse_host_port(host_port(*found)) == found


ODD = "10.0.0.1 10.0.0.1: 10.0.0.1:0 10.0.0.1:65536 10.0.0.1:-1 10.0.0.1:² 10.0.0.1:+1 web:80 :80"
ODD6 = "[10.0.0.1]:80 fd77::1:80 [fd77::1:80 fd77::1]:80 [[fd77::1]]:80 [fd77::1]80"


@pytest.mark.parametrize("text", ["", "10.0.0.1: 80", *ODD.split(), *ODD6.split()])
def test_what_is_none(text):
    with pytest.raises(ValueError, match=r"."):
        parse_host_port(text)


def test_a_port_of_the_kernels_choice():
    assert parse_host_port("0.0.0.0:0", least=0) == ("0.0.0.0", 0)
