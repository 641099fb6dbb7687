"""Whatever came and went, in whatever order: what is kept beside the resources is what would be made of them anew."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from controller.catalog import Index
from controller.events import Refused, Telemetry
from controller.publish import Publisher
from controller.registry import Registry
from controller.store import Entry, Op, Put
from mesh.compile import Compilation, Reach, compile_state
from mesh.resources import ResourceErrors
from mesh.snapshot import Versioned, digest

OURS = "apiVersion: mesh.pillion.dev/v1alpha1\n"
NODES, NAMESPACES, NAMES, LABELS = ("n1", "n2", "n3"), ("a", "b"), ("x", "y", "z"), ("p", "q")

node, namespace, name, label = map(st.sampled_from, (NODES, NAMESPACES, NAMES, LABELS))
SERVICE = st.builds(
    "apiVersion: v1\nkind: Service\nmetadata: {{name: {}, namespace: {}}}\n"
    "spec: {{selector: {}, {}ports: [{{port: 80, targetPort: {}}}]}}".format,
    name, namespace, st.sampled_from(["{app: p}", "{app: q}", "{app: p, tier: p}", "{tier: q}"]),
    st.sampled_from(["", "serviceAccounts: [x], "]), st.sampled_from([8080, 8081]),
)  # fmt: skip
WORKLOAD = st.builds(
    (OURS + "kind: Workload\nmetadata: {{name: w{}, namespace: {}, labels: {{app: {}}}}}\n"
    "spec: {{node: {}, serviceAccount: {}, addresses: [10.9.0.{}]}}").format,
    name, namespace, label, node, name, st.integers(1, 4),
)  # fmt: skip
POLICY = st.builds(
    (OURS + "kind: AuthorizationPolicy\nmetadata: {{name: {}, namespace: {}}}\n"
    "spec: {{action: {}, {}rules: [{}]}}").format,
    name, st.sampled_from([*NAMESPACES, "pillion-system"]), st.sampled_from(["ALLOW", "DENY"]),
    st.sampled_from(["", "selector: {matchLabels: {app: p}}, ", "targetRefs: [{kind: Service, name: x}], "]),
    st.sampled_from([
        "{}", "{from: [{source: {namespaces: [a]}}]}", "{from: [{source: {principals: ['mesh.local/ns/b/sa/x']}}]}",
        "{to: [{operation: {ports: ['8081']}}]}",
    ]),
)  # fmt: skip
ROUTE = st.builds(
    "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: {}}}\n"
    "spec: {{parentRefs: [{{kind: Service, name: {}}}], rules: [{{backendRefs: [{{name: {}, port: 80}}]}}]}}".format,
    namespace, name, name,
)  # fmt: skip
GRANT = st.builds(
    (OURS + "kind: NodeGrant\nmetadata: {{name: {}}}\nspec: {{node: {}, serviceAccounts: [{}]}}").format,
    node, node, st.sampled_from(["a/*, b/*", "a/x", "b/*", ""]),
)  # fmt: skip
PEERS = st.builds(
    (OURS + "kind: PeerAuthentication\nmetadata: {{name: {}, namespace: {}}}\n"
    "spec: {{{}mtls: {{mode: {}}}}}").format,
    name, st.sampled_from([*NAMESPACES, "pillion-system"]), st.sampled_from(["", "selector: {matchLabels: {app: p}}, "]),
    st.sampled_from(["STRICT", "PERMISSIVE"]),
)  # fmt: skip
STRICT = OURS + "kind: PeerAuthentication\nmetadata: {name: x, namespace: a}\nspec: {mtls: {mode: STRICT}}"
MESH = st.builds(
    (OURS + "kind: MeshConfig\nmetadata: {{name: mesh}}\nspec: {{defaultAction: {}, rootNamespace: {}}}").format,
    st.sampled_from(["ALLOW", "DENY"]), st.sampled_from(["pillion-system", "a"]),
)  # fmt: skip
ENTRY = st.builds(
    (OURS + "kind: ServiceEntry\nmetadata: {{name: e, namespace: {}}}\n"
    "spec: {{hosts: [e.test], ports: [{{number: 443, protocol: TLS}}]}}").format,
    namespace,
)  # fmt: skip
KINDS = (
    "Service",
    "Workload",
    "AuthorizationPolicy",
    "HTTPRoute",
    "PeerAuthentication",
    "MeshConfig",
    "ServiceEntry",
    "NodeGrant",
)
REGISTER = st.tuples(
    st.just("register"), node, namespace, st.builds("w{}".format, st.integers(1, 6)), name, st.integers(1, 6), st.dictionaries(
        st.sampled_from(["app", "tier"]), label, max_size=2)
)  # fmt: skip
UNREGISTER = st.tuples(st.just("unregister"), st.integers(0, 7))
APPLY = st.tuples(st.just("apply"), st.one_of(SERVICE, WORKLOAD, POLICY, ROUTE, GRANT, PEERS, MESH, ENTRY))
GRANTS = st.tuples(st.just("apply"), GRANT)
REST = st.one_of(
    st.tuples(st.just("delete"), st.sampled_from(KINDS), st.integers(0, 7)),
    st.tuples(st.just("cut"), node), st.tuples(st.just("admit"), node),
)  # fmt: skip
LOOK = st.tuples(st.just("look"))
STEP = st.sampled_from([REGISTER] * 6 + [UNREGISTER] * 4 + [APPLY, APPLY, GRANTS, REST] + [LOOK] * 5).flatmap(lambda kind: kind)
BEGINNING = "---\n".join(
    [
        *(
            f"{OURS}kind: NodeGrant\nmetadata: {{name: {each}}}\nspec: {{node: {each}, serviceAccounts: ['a/*', 'b/*']}}\n"
            for each in NODES
        ),
        *(
            f"apiVersion: v1\nkind: Service\nmetadata: {{name: {each}, namespace: {where}}}\n"
            f"spec: {{selector: {label}, ports: [{{port: 80, targetPort: 8080}}]}}\n"
            for each, where, label in (
                ("x", "a", "{app: p}"), ("x", "b", "{app: q}"), ("y", "b", "{app: p}"), ("z", "b", "{tier: q}")
            )
        ),
        *(
            f"{OURS}kind: AuthorizationPolicy\nmetadata: {{name: {each}, namespace: {where}}}\nspec: {{action: ALLOW, {rest}}}\n"
            for each, where, rest in (
                ("first", "a", "selector: {matchLabels: {app: p}}, rules: [{from: [{source: {namespaces: [b]}}]}]"),
                ("second", "b", "targetRefs: [{kind: Service, name: x}], rules: [{from: [{source: {namespaces: [b]}}]}]"),
                ("third", "b", "rules: [{from: [{source: "
                               "{principals: ['mesh.local/ns/a/sa/x']}}]}]"),
            )
        ),
        *(
            f"{OURS}kind: Workload\nmetadata: {{name: set-{each}, namespace: a, labels: {{app: p}}}}\n"
            f"spec: {{node: {each}, serviceAccount: x, addresses: [10.8.0.{each[1:]}]}}\n"
            for each in NODES
        ),
    ]
)  # fmt: skip


async def do(registry: Registry, step: tuple) -> None:
    """One step, which may be refused."""
    try:
        match step:
            case "register", at, ns, what, account, address, labels:
                addresses = [f"10.9.{NODES.index(at)}.{address}"]
                await registry.register(at, ns, what, account, addresses, labels, source="test")
            case "unregister", place:
                if found := [stored for stored in registry.get("Workload") if stored.owner]:
                    chosen = found[place % len(found)]
                    await registry.unregister(chosen.owner, *chosen.resource.key[1:])
            case "apply", text:
                await registry.apply(text, "test")
            case "delete", kind, place:
                if found := registry.get(kind):
                    await registry.delete(*found[place % len(found)].resource.key)
            case "cut", at:
                await registry.cut(at)
            case "admit", at:
                await registry.admit(at, [], [], readmit=True)
    except (Refused, ResourceErrors):
        pass


async def anew(store: Memory, authority: SimpleNamespace) -> tuple[Registry, Compilation]:
    """From what the store holds, without a memory."""
    registry = await Registry.open(store, authority, "mesh.local")
    inputs = registry.inputs(whole=True)
    compilation = Compilation()
    compilation.take(compilation.change(inputs.changes, inputs.allocations))
    assert compile_state([one for one in inputs.changes.values() if one is not None], inputs.allocations) == compilation.state
    return registry, compilation


async def same(
    store: Memory, authority: SimpleNamespace, registry: Registry, publisher: Publisher, told: dict[str, Versioned]
) -> None:
    await publisher.compile()
    fresh, compilation = await anew(store, authority)
    assert vars(fresh._index).keys() == vars(Index([], "")).keys()
    for what, held in vars(fresh._index).items():
        kept = getattr(registry._index, what)
        assert (kept._pairs == held._pairs) if what == "granted" else kept == held, what
    assert registry._ledger == fresh._ledger
    assert vars(registry._selection) == vars(fresh._selection)
    assert publisher.state == compilation.state
    for what, held in vars(compilation).items():  # nothing of what went is left behind
        kept = getattr(publisher._compilation, what)
        assert (vars(kept) == vars(held)) if what in ("_selection", "_modes") else kept == held, what
    reach = Reach(compilation.state)
    for each in (*NODES, "nobody"):
        seen, wanted = publisher.for_node(each), reach.of(each)
        assert seen.state == wanted, each
        assert seen.digest == digest(wanted), each
        if each in told:  # what was given away before is what it was, and a delta leads on from it
            assert told[each].digest == digest(told[each].state), each
            assert told[each].next(seen.state, seen.revision)[0].digest == seen.digest, each
        told[each] = seen


class Memory:
    """A `Store` without a disk."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.at = 0

    async def revision(self) -> int:
        return self.at

    async def get(self, key: str) -> Entry | None:
        return self.entries.get(key)

    async def list(self, prefix: str) -> tuple[int, list[Entry]]:
        return self.at, [entry for key, entry in sorted(self.entries.items()) if key.startswith(prefix)]

    async def put(self, key: str, value: bytes, expect: int | None = None) -> int:
        assert expect is None or key not in self.entries
        return await self.transaction([], [Put(key, value)])

    async def transaction(self, checks: Sequence[object], ops: Sequence[Op]) -> int:
        assert not checks
        self.at += bool(ops)
        for op in ops:
            old = self.entries.pop(op.key, None)
            if isinstance(op, Put):
                self.entries[op.key] = Entry(op.key, op.value, old.created if old else self.at, self.at)
        return self.at


async def run(steps: list[tuple]) -> None:
    store, authority = Memory(), SimpleNamespace(bundle=("PEM",))
    registry = await Registry.open(store, authority, "mesh.local")
    publisher = Publisher(registry, Telemetry())
    told: dict[str, Versioned] = {}
    await registry.apply(BEGINNING, "test")
    await same(store, authority, registry, publisher, told)
    for step in steps:
        if step[0] == "look":
            await same(store, authority, registry, publisher, told)
        else:
            await do(registry, step)
    await same(store, authority, registry, publisher, told)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@example([("register", "n1", "a", "w1", "x", 1, {"app": "p"}), ("cut", "n1"), ("look",), ("admit", "n1")])
@example([("apply", STRICT), ("look",), ("delete", "PeerAuthentication", 0)])
@given(st.lists(STEP, min_size=10, max_size=40))
def test_what_follows_is_what_would_be_made_anew(steps: list[tuple]) -> None:
    asyncio.run(run(steps))
