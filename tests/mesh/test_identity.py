import pytest

from mesh.identity import ControllerId, IdentityError, NodeId, OperatorId, SpiffeId, parse

WEB = SpiffeId("mesh.local", "shop", "web")


def test_a_workload_identity_has_one_text():
    assert str(WEB) == "spiffe://mesh.local/ns/shop/sa/web"
    assert SpiffeId.parse(str(WEB)) == WEB
    assert WEB.principal == "mesh.local/ns/shop/sa/web"
    assert WEB.short == "shop/web"


def test_the_server_name_is_one_of_dns():
    assert WEB.sni() == "web.shop.mesh.local"


@pytest.mark.parametrize("identity", [WEB, NodeId("mesh.local", "n1"), OperatorId("a.b", "kim"), ControllerId("mesh.local")])
def test_every_form_leads_back(identity):
    assert parse(str(identity)) == identity


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiffe://",
        "https://mesh.local/ns/shop/sa/web",
        "SPIFFE://mesh.local/ns/shop/sa/web",
        "spiffe://mesh.local/ns/shop/sa/web/",
        "spiffe://mesh.local/ns/shop/sa/web?x",
        "spiffe://mesh.local/ns/shop/sa/Web",
        "spiffe://mesh.local/ns/shop/sa/w%65b",
        "spiffe://mesh.local/ns//sa/web",
        "spiffe://mesh.local:443/ns/shop/sa/web",
        "spiffe://user@mesh.local/ns/shop/sa/web",
        "spiffe://mesh.local/ns/shop/sa/web\n",
        "spiffe://mesh.local/ns/-a/sa/web",
        "spiffe://mesh.local/ns/shop/sa/" + "a" * 64,
        "spiffe://" + "a." * 70 + "b/controller",
        "spiffe://mesh.local/node/n1/x",
        "spiffe://mesh.local/controller/x",
        "spiffe://mesh.local/" + "x" * 3000,
    ],
)
def test_no_second_spelling_is_taken(text):
    with pytest.raises(IdentityError):
        parse(text)


def test_a_node_is_no_workload():
    with pytest.raises(IdentityError, match="not a workload"):
        SpiffeId.parse("spiffe://mesh.local/node/n1")
