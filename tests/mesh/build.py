"""Small States for tests of the pure modules."""

from __future__ import annotations

from mesh import compile as compiler
from mesh import resources
from mesh.model import Action, Config, Identity, Item, Policy, Protocol, Rule, Service, ServicePort, State, Workload, key_of

TD = "mesh.local"
WEB = "Workload/shop/web-1"


def principal(namespace: str, account: str) -> str:
    return f"{TD}/ns/{namespace}/sa/{account}"


def spiffe(namespace: str, account: str) -> str:
    return f"spiffe://{principal(namespace, account)}"


def state(*items: Item, default: Action = Action.DENY) -> State:
    out = {key_of(item): item for item in items}
    config = Config(trust_domain=TD, default_action=default)
    out.setdefault(key_of(config), config)
    return out


def workload(
    name: str = "web-1", namespace: str = "shop", *, node: str = "n1", account: str = "web", number: int = 300, **more
) -> Workload:
    more.setdefault("labels", {"app": account})
    more.setdefault("ports", (8080,))
    more.setdefault("addresses", (f"10.77.1.{number % 250 + 1}",))
    return Workload(number, name, namespace, node, number, spiffe(namespace, account), **more)


def identity(namespace: str, account: str, number: int) -> Identity:
    return Identity(number, spiffe(namespace, account))


def service(name: str, namespace: str = "shop", *, number: int = 500, port: int = 80, target: int = 8080, **more) -> Service:
    protocol = more.pop("protocol", Protocol.HTTP)
    more.setdefault("vips", (f"240.0.0.{number % 250 + 1}",))
    return Service(number, name, namespace, ports=(ServicePort(port, target, protocol=protocol),), **more)


def policy(name: str, action: Action, *rules: Rule, namespace: str = "shop", **more) -> Policy:
    return Policy(name, namespace, action, rules=rules, **more)


def compiled(text: str) -> State:
    """A YAML text through the whole of resources and compile, with numbers given out in order."""
    loaded = resources.load(text, "test.yaml")
    wanted = compiler.needs(loaded, TD)
    numbers = [
        {name: 256 + index for index, name in enumerate(names)}
        for names in (wanted.identities, wanted.workloads, wanted.services)
    ]
    vips = {name: (f"240.0.0.{index + 1}", f"fd50:494c::{index + 1:x}") for index, name in enumerate(wanted.services)}
    return compiler.compile_state(loaded, compiler.Allocations(*numbers, vips, ("PEM",), ()))
