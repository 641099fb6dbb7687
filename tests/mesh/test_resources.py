"""What operators write: what is taken, and every refusal with its line, field and remedy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import resources, yamltree
from mesh.resources import ResourceErrors, dump, dump_yaml, from_dict, load, make_workload

SERVICE = """\
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
spec:
  selector:
    app: web
  ports:
  - port: 80
    targetPort: 8080
    appProtocol: http
"""
WORKLOAD = """\
apiVersion: mesh.pillion.dev/v1alpha1
kind: Workload
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec:
  node: n1
  serviceAccount: web
  addresses: [10.77.1.2, "fd77:1::2"]
"""
GRANT = """\
apiVersion: mesh.pillion.dev/v1alpha1
kind: NodeGrant
metadata: {name: n1}
spec: {node: n1, serviceAccounts: [shop/web, jobs/*]}
"""
ROUTE = """\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: web, port: 80}]
  rules:
  - matches:
    - path: {type: PathPrefix, value: /api}
      headers: [{name: X-Canary, value: "1"}]
    backendRefs: [{name: web, port: 80, weight: 90}, {name: web-v2, port: 80, weight: 10}]
"""
POLICY = """\
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  action: ALLOW
  rules:
  - from: [{source: {principals: [mesh.local/ns/shop/sa/client], notIpBlocks: [10.9.0.0/16]}}]
    to: [{operation: {methods: [GET], paths: ["/api/*"], ports: ["8080"], headers: [{name: X-User}]}}]
"""
PEERS = """\
apiVersion: mesh.pillion.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: old, namespace: shop}
spec: {mtls: {mode: PERMISSIVE}}
"""
CONFIG = """\
apiVersion: mesh.pillion.dev/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec:
  outbound: DENY
  outboundAllow: [{cidr: 10.0.0.0/8, ports: [443]}]
  dnsUpstreams: ["10.0.0.53:53", "[fd00::53]:53"]
  headTimeoutSeconds: 2.5
"""
ALL = [SERVICE, WORKLOAD, GRANT, ROUTE, POLICY, PEERS, CONFIG]


def errors(text):
    with pytest.raises(ResourceErrors) as caught:
        load(text, "shop.yaml")
    return caught.value.errors


@pytest.mark.parametrize("text", ALL)
def test_what_is_read_is_written_back(text):
    (resource,) = load(text)
    assert load(dump_yaml([resource])) == [resource]
    assert from_dict(dump(resource)) == resource


def test_a_stream_of_documents():
    found = load("---\n".join(ALL) + "---\n# nothing\n---\n")
    assert [resource.key for resource in found][:3] == [
        ("Service", "shop", "web"),
        ("Workload", "shop", "web-1"),
        ("NodeGrant", "", "n1"),
    ]


def test_json_is_taken_tabs_included():
    head = '{"apiVersion": "v1", "kind": "Service",\n\t"metadata": {"name": "a"},'
    text = head + '\n\t"spec": {"selector": {"a": "b"}, "ports": [{"port": 80}]}}'
    assert load(text)[0].key == ("Service", "default", "a")
    assert errors(text.replace("80", '"80"'))[0].line == 3


@pytest.mark.parametrize(
    ("text", "old", "new", "line", "field", "message", "remedy"),
    [
        (SERVICE, "port: 80\n", "port: 0\n", 10, "spec.ports[0].port", "0 is out of range", "greater than or equal to 1"),
        (SERVICE, "port: 80\n", 'port: "80"\n', 10, "spec.ports[0].port", "expected a whole number, found text", "whole number"),
        (SERVICE, "port: 80\n", "port: true\n", 10, "spec.ports[0].port", "expected a whole number", ""),
        (
            SERVICE,
            "targetPort: 8080",
            "targetport: 8080",
            11,
            "spec.ports[0].targetport",
            "not known",
            "did you mean targetPort?",
        ),
        (SERVICE, "targetPort: 8080", "target_port: 8080", 11, "spec.ports[0].target_port", "not known", "targetPort"),
        (SERVICE, "targetPort: 8080", "targetPort: 15008", 10, "spec.ports[0]", "the mesh's own", "another port"),
        (SERVICE, "appProtocol: http", "appProtocol: h2c", 10, "spec.ports[0]", "is not spoken", "tcp carries anything"),
        (SERVICE, "    app: web", "    app: 1", 8, "spec.selector.app", "expected text, found a number", "in quotes"),
        (SERVICE, "name: web", "name: Web", 4, "metadata.name", "not a DNS label", "lower-case"),
        (SERVICE, "  name: web\n", "", 3, "metadata.name", "missing", "add name"),
        (SERVICE, "kind: Service", "kind: Servise", 2, "kind", "not known", "did you mean Service?"),
        (SERVICE, "kind: Service\n", "", 1, "kind", "missing", "use one of"),
        (SERVICE, "apiVersion: v1", "apiVersion: v2", 1, "apiVersion", "not taken", "'v1'"),
        (SERVICE, "  selector:\n    app: web\n", "  selector: {}\n", 7, "spec.selector", "fewer than 1", "at least 1"),
        (SERVICE, "spec:", "status: {}\nspec:", 6, "status", "not known", "remove it"),
        (
            SERVICE,
            "  namespace: shop",
            "  annotations: {mesh.pillion.dev/add-headers: x-evil}",
            1,
            "",
            "can not be added",
            "traceparent",
        ),
        (WORKLOAD, '"fd77:1::2"', "10.77.1.3", 4, "spec", "two addresses of one family", "at most one"),
        (WORKLOAD, '"fd77:1::2"', '"FD77:1::2"', 7, "spec.addresses[1]", "canonical", "write fd77:1::2"),
        (WORKLOAD, '"fd77:1::2"', '"::ffff:10.0.0.1"', 7, "spec.addresses[1]", "canonical", "write 10.0.0.1"),
        (WORKLOAD, "10.77.1.2", "127.0.0.1", 7, "spec.addresses[0]", "can not be", "other machines"),
        (WORKLOAD, "  node: n1\n", "", 4, "spec.node", "missing", "add node"),
        (GRANT, "shop/web", "'*'", 4, "spec.serviceAccounts[0]", "not a grant", "<namespace>/*"),
        (GRANT, "{name: n1}", "{name: n1, namespace: shop}", 1, "", "belongs to no namespace", "remove"),
        (ROUTE, "kind: Service, ", "kind: Gateway, ", 5, "spec.parentRefs[0].kind", "not taken", "Service"),
        (ROUTE, "value: /api", "value: api", 8, "spec.rules[0].matches[0].path", "not a path", "start it with"),
        (
            ROUTE,
            "type: PathPrefix, value: /api",
            "type: RegularExpression, value: (a+)+",
            8,
            "spec.rules[0].matches[0].path",
            "exponential",
            "Exact",
        ),
        (ROUTE, "weight: 90", "weight: -1", 10, "spec.rules[0].backendRefs[0].weight", "out of range", ""),
        (
            ROUTE,
            "{name: web, port: 80, weight",
            "{name: web, namespace: x, port: 80, weight",
            1,
            "",
            "another namespace",
            "move the route",
        ),
        (
            ROUTE,
            "    backendRefs",
            "    filters: []\n    backendRefs",
            10,
            "spec.rules[0].filters",
            "not known",
            "remove it; known here: name, matches",
        ),
        (POLICY, "action: ALLOW", "action: allow", 6, "spec.action", "not taken", "'ALLOW', 'DENY' or 'AUDIT'"),
        (
            POLICY,
            "mesh.local/ns",
            "spiffe://mesh.local/ns",
            8,
            "spec.rules[0].from[0].source.principals[0]",
            "without its scheme",
            "write mesh.local",
        ),
        (POLICY, "sa/client", "*/client", 8, "spec.rules[0].from[0].source.principals[0]", "not a pattern", "once"),
        (
            POLICY,
            "10.9.0.0/16",
            "10.9.0.1/16",
            8,
            "spec.rules[0].from[0].source.notIpBlocks[0]",
            "not an address range",
            "no host bits",
        ),
        (POLICY, '"8080"', '"x"', 9, "spec.rules[0].to[0].operation.ports[0]", "not a port", "1 to 65535"),
        (POLICY, '"/api/*"', '"api"', 9, "spec.rules[0].to[0].operation.paths[0]", "does not start", "/prefix/*"),
        (
            POLICY,
            "principals: [mesh.local/ns/shop/sa/client]",
            "principals: mesh.local",
            8,
            "spec.rules[0].from[0].source.principals",
            "expected a list",
            "",
        ),
        (POLICY, "    to:", "    when: []\n    to:", 9, "spec.rules[0].when", "not known", "known here: from, to"),
        (POLICY, "  action: ALLOW", "  targetRefs: [{kind: Service, name: web}]", 4, "spec", "exclude each other", "keep one"),
        (PEERS, "PERMISSIVE", "DISABLE", 4, "spec.mtls.mode", "not taken", "STRICT"),
        (CONFIG, "headTimeoutSeconds: 2.5", 'dnsForward: ["a*b"]', 8, "spec.dnsForward[0]", "not a pattern", "once"),
        (CONFIG, "headTimeoutSeconds: 2.5", "dnsForward: [{names: []}]", 8, "spec.dnsForward[0].names", "fewer", "at least 1"),
        (CONFIG, "name: mesh", "name: other", 1, "", "one MeshConfig", "name it mesh"),
        (CONFIG, "2.5", "1e9", 8, "spec.headTimeoutSeconds", "out of range", "less than or equal"),
        (
            CONFIG,
            "headTimeoutSeconds: 2.5",
            "policyLeaseSeconds: 1",
            8,
            "spec.policyLeaseSeconds",
            "a lease of 1 s",
            "at least 3",
        ),
        (CONFIG, "headTimeoutSeconds: 2.5", "policyLeaseSeconds: 1e6", 8, "spec.policyLeaseSeconds", "out of range", "less than"),
        (CONFIG, "10.0.0.0/8", '"::ffff:10.0.0.0/104"', 6, "spec.outboundAllow[0].cidr", "IPv4 in disguise", "write the IPv4"),
        (CONFIG, "headTimeoutSeconds: 2.5", "express: never", 8, "spec.express", "not taken here", "'auto' or 'off'"),
        (CONFIG, "headTimeoutSeconds: 2.5", "express: false", 8, "spec.express", "not taken here", "'auto' or 'off'"),
        (SERVICE, "spec:\n", "spec:\n  express: on\n", 7, "spec.express", "not taken here", "'auto' or 'off'"),
        (WORKLOAD, "spec:\n", "spec:\n  express: kernel\n", 5, "spec.express", "not taken here", "'auto' or 'off'"),
        (CONFIG, "10.0.0.53:53", "dns:53", 7, "spec.dnsUpstreams[0]", "not address:port", "write it as"),
        (CONFIG, "ports: [443]", "ports: [1,2,3,4,5,6,7,8,9]", 6, "spec.outboundAllow[0].ports", "more than 8", "smaller"),
    ],
)
def test_refusals(text, old, new, line, field, message, remedy):
    assert old in text
    (error,) = errors(text.replace(old, new, 1))
    assert (error.file, error.line, error.field) == ("shop.yaml", line, field)
    assert message in error.message
    assert remedy in error.remedy
    assert error.remedy


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "no resource"),
        ("# only words", 1, "no resource"),
        ("a: [", 2, "not YAML"),
        ("a: 1\nb: : 2", 2, "not YAML"),
        ("a: 1\na: 2", 2, "twice"),
        ("a: &x 1\nb: *x", 1, "anchors"),
        ("a: 1\nb: *x", 2, "anchors"),
        ("a: !!python/object:os.system x", 1, "tag"),
        ("a: !x 1", 1, "tag"),
        ("<<: {a: 1}", 1, "merge"),
        ("? [a]\n: 1", 1, "key must be text"),
        ("- 1\n- 2", 1, "a list"),
        ("text", 1, "text"),
        ("a: " + "[" * 40 + "]" * 40, 1, "nested deeper"),
        ("a: " + "9" * 30, 1, "digits"),
        ("a: \x00", 1, "not YAML"),
        ("kind: Service\n---\nkind: Service\nx: *y", 4, "anchors"),
    ],
)
def test_what_is_not_configuration(text, line, message):
    first = errors(text)[0]
    assert first.line == line
    assert message in first.message


def test_all_errors_come_at_once_and_nothing_else():
    broken = SERVICE.replace("port: 80\n", "port: 0\n").replace("name: web", "name: WEB")
    found = errors(broken + "---\n" + WORKLOAD + "---\n" + "kind: Nothing\n")
    assert [(error.line, error.field) for error in found] == [(4, "metadata.name"), (10, "spec.ports[0].port"), (22, "kind")]


def test_one_resource_twice():
    (error,) = errors(SERVICE + "---\n" + SERVICE)
    assert "also at line 1" in error.message
    assert error.line == 14


def test_limits(monkeypatch):
    assert "fewer" not in errors("a: " + "x" * (yamltree.TEXT_BYTES_MAX + 1))[0].message
    monkeypatch.setattr(yamltree, "DOCUMENTS_MAX", 2)
    assert "more than 2 documents" in errors("---\n".join(ALL))[0].message
    monkeypatch.setattr(yamltree, "NODES_MAX", 5)
    assert "more than 5 nodes" in errors(SERVICE)[0].message
    assert len(errors("kind: x\n---\n" * 2)) <= resources.ERRORS_MAX


def test_many_rules_are_too_many():
    rules = "".join("  - {}\n" for _ in range(65))
    (error,) = errors(POLICY.partition("  rules:")[0] + "  rules:\n" + rules)
    assert (error.field, error.message) == ("spec.rules", "more than 64 entries")


@given(st.text(max_size=80))
def test_no_text_does_anything_but_refuse(text):
    with pytest.raises(ResourceErrors):
        load(text)


@given(
    st.dictionaries(
        st.sampled_from(["kind", "apiVersion", "metadata", "spec"]),
        st.one_of(st.none(), st.text(), st.integers(), st.lists(st.text())),
        max_size=4,
    )
)
def test_no_data_does_anything_but_refuse(data):
    with pytest.raises(ResourceErrors):
        from_dict(data)


def test_a_workload_as_an_agent_registers_it():
    made = make_workload("shop", "web-1", "n1", "web", ["10.77.1.2", "fd77:1::2"], {"app": "web"})
    assert [made] == load(WORKLOAD)
    with pytest.raises(ResourceErrors, match="not a DNS label"):
        make_workload("shop", "web-1", "n1", "../web", ["10.77.1.2"], {})
