"""What a node's facts mean for its security: a finding for each thing the mesh promises, with what to do where it is not kept.

Pure: facts in, findings out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mesh.model import CONFIG_KEY, Action, Config, Policy, State, TlsMode, Workload
from pillion.node_facts import CAPABILITY_SETS, Facts, Mode, Process

NAMED_MAX = 8  # of a kind, in a finding
INITIAL_USER_NAMESPACE = "user:[4026531837]"
# Each of them is a way out of a cgroup, a namespace or a seccomp filter, or past the programs
STRONG = {
    1: "DAC_OVERRIDE",
    2: "DAC_READ_SEARCH",
    16: "SYS_MODULE",
    17: "SYS_RAWIO",
    19: "SYS_PTRACE",
    21: "SYS_ADMIN",
    39: "BPF",
}


class Verdict(StrEnum):
    ENFORCED = "enforced"
    NOT = "not enforced"
    UNKNOWN = "could not tell"


@dataclass(frozen=True)
class Finding:
    check: str
    verdict: Verdict
    seen: str
    remedy: str = ""


def judged(check: str, wrong: list[str], fine: str, remedy: str, unknown: Iterable[str] = ()) -> Finding:
    """Not enforced if something is wrong, else unknown if something could not be read."""
    unknown = list(unknown)
    if wrong:
        return Finding(check, Verdict.NOT, _some(wrong), remedy)
    if unknown:
        return Finding(check, Verdict.UNKNOWN, _some(unknown), "run it as root on the node itself, with its agent running")
    return Finding(check, Verdict.ENFORCED, fine)


def _some(texts: list[str]) -> str:
    rest = len(texts) - NAMED_MAX
    return "; ".join(texts[:NAMED_MAX]) + (f"; and {rest} more" if rest > 0 else "")


def judge(facts: Facts, status: dict[str, Any], state: State | None) -> list[Finding]:
    """``status``: the agent's; ``state``: what the node enforces, None if it could not be had."""
    return [
        _agent(status, facts.agent),
        _programs(status, facts),
        _cables(status, facts),
        _parts(status),
        *_lease(status),
        *_proxy(facts),
        *_files(facts),
        _kernel(facts),
        *_workloads(facts, status),
        *_policy(state, str(status.get("node", ""))),
    ]


# ---- the node


def _agent(status: dict[str, Any], agent: Process | None) -> Finding:
    wrong = [] if status.get("ready") else [f"not ready: {status.get('detail') or 'no reason given'}"]
    if not (status.get("controller") or {}).get("connected"):
        wrong.append("no stream from the controller")
    unknown = [] if agent is not None else ["its process cannot be seen"]
    return judged(
        "agent", wrong, f"ready, revision {status.get('revision')}", "see: pillion status, and the agent's log", unknown
    )


def _programs(status: dict[str, Any], facts: Facts) -> Finding:
    programs: dict[str, bool] = status.get("programs") or {}
    wrong = [f"{name} is not attached" for name, attached in programs.items() if not attached]
    wrong += [f"{name}: its link is not on the node's cgroup" for name, attached in facts.links.items() if attached is False]
    unknown = [f"{name}: its link cannot be read" for name, attached in facts.links.items() if attached is None]
    if not programs:
        wrong.append("the agent has loaded none")
    elif not facts.links:
        unknown.append("no pinned link was found")
    fine = f"{len(programs)} programs; {len(facts.links)} links on the node's cgroup, by the kernel's word"
    return judged("programs", wrong, fine, "restart the agent and read its log; another kernel may be needed", unknown)


def _cables(status: dict[str, Any], facts: Facts) -> Finding:
    """What no cgroup program sees (raw sockets' packets, foreign source addresses) stops at the host's side of a pod's cable."""
    pods = {f"{w['namespace']}/{w['name']}" for w in status.get("workloads", []) if w.get("netns")}
    wrong = [f"{name}: no filter on its veth" for name in sorted(pods) if facts.cables.get(name) is False]
    unknown = [f"{name}: the filters on its veth cannot be listed" for name in sorted(pods) if facts.cables.get(name) is None]
    return judged(
        "pods' cables",
        wrong,
        f"the filter is on {len(pods)}, by the kernel's word",
        "name the host's side as `veth` in the workload's entry; the agent puts a filter that was removed back within seconds: "
        "if it does not, read its log, and see who else changes tc there",
        unknown,
    )


def _parts(status: dict[str, Any]) -> Finding:
    """What this kernel can not do (nodeagent/optional.py). Express is no defence."""
    parts: dict[str, dict[str, Any]] = status.get("optional") or {}
    wrong = [f"{part}: {seen.get('why')}; {seen.get('instead')}" for part, seen in parts.items() if not seen.get("on")]
    return judged(
        "parts of the kernel",
        [text for text in wrong if not text.startswith("express:")],
        "filters on cables, and ending connections, work here",
        "use a kernel that has it: pillion check --pre names what is missing",
        [] if parts else ["the agent does not say which it could use"],
    )


def _lease(status: dict[str, Any]) -> Iterator[Finding]:
    age, lease = status.get("policy_age_s"), status.get("policy_lease_s")
    remedy = "set policyLeaseSeconds in MeshConfig, for example 3600: past it a node lets nothing new in"
    if lease is None:
        yield Finding("policy lease", Verdict.UNKNOWN, "the agent does not say", "update the agent")
    elif not lease:
        yield Finding("policy lease", Verdict.NOT, "none: a node that is cut off goes on by an old policy for ever", remedy)
    else:
        yield Finding("policy lease", Verdict.ENFORCED, f"{lease:g} s")
    stale = age is None or age > (lease or 60.0)
    seen = "never confirmed" if age is None else f"confirmed {age:.0f} s ago"
    yield judged("policy age", [seen] if stale else [], seen, "see why the controller is not heard: pillion status")


def _kernel(facts: Facts) -> Finding:
    value = facts.sysctls.get("kernel.unprivileged_bpf_disabled")
    wrong = ["anyone may load eBPF programs"] if value == "0" else []
    unknown = ["kernel.unprivileged_bpf_disabled cannot be read"] if value is None else []
    return judged(
        "unprivileged eBPF", wrong, "off", "sysctl -w kernel.unprivileged_bpf_disabled=1, and in /etc/sysctl.d", unknown
    )


# ---- the proxy


def _proxy(facts: Facts) -> Iterator[Finding]:
    restart = "restart the proxy as root and read its log: it confines itself before it serves"
    gone = [f"pid {pid} cannot be seen" for pid, found in facts.proxies.items() if found is None]
    if not facts.proxies:
        yield Finding("proxy", Verdict.NOT, "no worker is connected", "start the proxy; until then nothing is forwarded")
        return
    there = [found for found in facts.proxies.values() if found is not None]

    def each(check: str, wrong: list[str], fine: str) -> Finding:
        return judged(check, wrong, fine, restart, gone)

    yield each(
        "proxy user",
        [f"pid {p.pid} runs as root" for p in there if p.uid == 0],
        _some([f"uid {u}" for u in {p.uid for p in there}]),
    )
    held = [f"pid {p.pid}: {name} {p.capabilities[name]:x}" for p in there for name in CAPABILITY_SETS if p.capabilities[name]]
    yield each("proxy capabilities", held, "none, in all five sets")
    yield each("proxy no_new_privs", [f"pid {p.pid}: off" for p in there if not p.no_new_privileges], "on")
    yield each("proxy seccomp", [f"pid {p.pid}: mode {p.seccomp}" for p in there if p.seccomp != 2], "a filter")
    reach = [
        f"pid {p.pid} has {', '.join(set(p.interfaces) - {'lo'})}" for p in there if p.interfaces and set(p.interfaces) > {"lo"}
    ]
    yield judged(
        "proxy network", reach, "an empty namespace", restart, [*gone, *(f"pid {p.pid}" for p in there if p.interfaces is None)]
    )
    yield judged(
        "proxy memory",
        [f"pid {p.pid} can be dumped by its own user" for p in there if p.dumpable],
        "may not be dumped or traced by its user",
        restart,
        [*gone, *(f"pid {p.pid}" for p in there if p.dumpable is None)],
    )
    outside = [
        f"pid {p.pid} is in {p.cgroup or '?'}"
        for p in there
        if not p.cgroup.endswith("/proxy") and "/pillion-proxy.slice/" not in p.cgroup
    ]
    yield judged("proxy cgroup", outside, "<node>/proxy", "start the proxy in the cgroup `proxy` below the node's", gone)


# ---- files


def _files(facts: Facts) -> Iterator[Finding]:
    bpf = facts.files.get("bpffs")
    wrong = []
    if bpf is not None:
        wrong += [] if bpf.bpffs else [f"{bpf.path} is no bpffs"]
        wrong += _loose(bpf)
    remedy = "let the agent mount its own: an empty --bpf-dir, root's, 0700"
    unknown = [] if bpf else ["its directory cannot be seen"]
    yield judged("bpffs", wrong, f"{bpf.path} is the mesh's own" if bpf else "", remedy, unknown)
    rest = {name: mode for name, mode in facts.files.items() if name != "bpffs"}
    yield judged(
        "sockets and state",
        [text for mode in rest.values() if mode is not None for text in _loose(mode)],
        f"{len(rest)} of root alone",
        "stop the process that made it, remove it, and start that process again as root",
        [f"{name} cannot be seen" for name, mode in rest.items() if mode is None],
    )


def _loose(mode: Mode) -> list[str]:
    bits = mode.mode & 0o777
    return [f"{mode.path}: {bits:04o}, uid {mode.uid}"] if bits & 0o077 or mode.uid else []


# ---- workloads


def _workloads(facts: Facts, status: dict[str, Any]) -> Iterator[Finding]:
    unseen = [f"{name}: its processes cannot be seen" for name, found in facts.workloads.items() if found is None]
    there = [(name, p) for name, found in facts.workloads.items() for p in found or ()]
    strong = {name: why for name, p in there if (why := _way_out(p))}
    yield judged(
        "workloads confined",
        [f"{name} {why}" for name, why in strong.items()],
        f"{len(facts.workloads)} cannot leave their cgroups",
        "run it as its own user without capabilities, or with ProtectControlGroups= and a bounding set; a container's "
        "runtime gives it a user namespace or a read-only cgroup mount",
        unseen,
    )
    asks = {name: f"{name} (pid {p.pid}) reaches {' and '.join(p.managers)}" for name, p in there if p.managers}
    yield judged(
        "service managers",
        list(asks.values()),
        f"out of reach of {len(facts.workloads)}",
        "it may have programs started outside the mesh, or names resolved past the mesh's DNS: enrol it as a service, without "
        "--allow-dbus unless it needs D-Bus",
        unseen,
    )
    wrong = []
    for name, mode in facts.cgroups.items():
        if mode is not None and (mode.uid or mode.mode & 0o022):
            wrong.append(f"{name}: {mode.path} belongs to uid {mode.uid}, {mode.mode:04o}")
    unknown = [f"{name}: its cgroup cannot be seen" for name, mode in facts.cgroups.items() if mode is None]
    yield judged(
        "workloads' cgroups", wrong, "of root alone", "chown root and chmod go-w: who writes there picks an identity", unknown
    )
    yield _moves(status)
    named = {f"{w['namespace']}/{w['name']}": w for w in status.get("workloads", [])}
    users: dict[int, dict[str, str]] = {}
    for name, p in there:
        if named.get(name, {}).get("netns"):
            continue  # a pod: its own pid namespace is its runtime's affair
        users.setdefault(p.uid, {})[str(named.get(name, {}).get("spiffe") or name)] = name
    shared = [f"uid {uid}: {', '.join(sorted(names.values()))}" for uid, names in users.items() if len(names) > 1]
    yield judged(
        "one user an identity",
        shared,
        "no two on this host share one",
        "give each service its own user: one may trace the other",
        unseen,
    )
    now = time.time()
    bare = [f"{name}: {w.get('detail') or 'no certificate'}" for name, w in named.items() if not _certified(w, now)]
    yield judged("certificates", bare, f"{len(named)} workloads have one", "see: pillion identity list, and the agent's log")


def _moves(status: dict[str, Any]) -> Finding:
    moves: dict[str, Any] | None = status.get("moves")
    told = moves or {}
    before = sum(value for name, value in told.items() if name.startswith("process_moved"))
    return judged(
        "processes in place",
        [f"{stray['workload']}: pid {stray['pid']} left it and is in {stray['into']}" for stray in told.get("strays", ())],
        "each is in its workload's cgroup" + (f"; {before} moves since the agent's start" if before else ""),
        "end that process, and find who may write cgroup files: what it connects now is another's, or nobody's",
        [] if moves is not None else ["the agent does not say"],
    )


def _certified(workload: dict[str, Any], now: float) -> bool:
    return float((workload.get("svid") or {}).get("not_after", 0)) > now


def _way_out(found: Process) -> str:
    """How a process could leave its cgroup, and with it its identity; empty: it can not."""
    if found.user_namespace not in (INITIAL_USER_NAMESPACE, None):
        return ""
    strong = [name for bit, name in STRONG.items() if found.capabilities["CapEff"] >> bit & 1]
    if strong:
        return f"(pid {found.pid}) has {', '.join(strong)}"
    if found.uid == 0 and found.cgroup_writable is not False:
        return f"(pid {found.pid}) is root and sees cgroups it can write"
    return ""


# ---- policy


def _policy(state: State | None, node: str) -> Iterator[Finding]:
    config = state.get(CONFIG_KEY) if state is not None else None
    if state is None or not isinstance(config, Config):
        yield Finding("policy", Verdict.UNKNOWN, "the node's state could not be had", "see: pillion status")
        return
    for check, action, what in (
        ("defaultAction", config.default_action, "what no policy selects is let in"),
        ("outbound", config.outbound, "workloads may reach anything outside the mesh"),
    ):
        wrong = [f"ALLOW: {what}"] if action is not Action.DENY else []
        yield judged(check, wrong, "DENY", f"set {check}: DENY in MeshConfig, after policies for what must pass")
    open_to_all = [entry.cidr for entry in config.outbound_allow if entry.cidr in ("0.0.0.0/0", "::/0")]
    yield judged("outboundAllow", open_to_all, f"{len(config.outbound_allow)} ranges", "name the ranges that are needed")
    local = [item for item in state.values() if isinstance(item, Workload) and item.node == node]
    plain = [f"{w.namespace}/{w.name}" for w in local if w.tls is TlsMode.PERMISSIVE]
    yield judged(
        "mutual TLS", plain, "STRICT for all", "PERMISSIVE lets in plaintext from anyone: set mode: STRICT in PeerAuthentication"
    )
    dry = [
        f"{item.namespace}/{item.name} would {item.dry_run}"
        for item in state.values()
        if isinstance(item, Policy) and item.dry_run
    ]
    yield judged("audit mode", dry, "every policy is enforced", "look at its audited flows, then set mode: enforce")
