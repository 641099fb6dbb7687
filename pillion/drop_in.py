"""What an enrolment writes for systemd: a slice for the unit, and drop-ins that close the ways out of it. Pure."""

from __future__ import annotations

import re
import sys
from pathlib import Path

CURRENT = Path("/opt/pillion/current")
SLICES = "pillion-workloads.slice"
AGENT = "pillion-agent.service"
PINS = "run-pillion-bpf.mount"
AWAITING = "-m pillion.awaiting "
MARK = "# Made by `pillion enrol`; `pillion withdraw` removes it."
# Each is a way out of a cgroup or a namespace, or past the programs; see docs/hosts.md
STRONG = (
    "CAP_SYS_ADMIN CAP_SYS_PTRACE CAP_SYS_MODULE CAP_SYS_RAWIO CAP_SYS_CHROOT CAP_SYS_BOOT CAP_BPF CAP_PERFMON CAP_NET_ADMIN "
    "CAP_NET_RAW CAP_MKNOD CAP_DAC_READ_SEARCH CAP_DAC_OVERRIDE CAP_MAC_ADMIN CAP_MAC_OVERRIDE"
)
# So are these for who has them and is not root: to another's user, or to a file that another's program runs or believes
AMBIENT = f"{STRONG} CAP_SETUID CAP_SETGID CAP_CHOWN CAP_FOWNER CAP_SETFCAP"
# Who reaches one of these has a program started elsewhere: by the system's manager, or by the user's own, which logind starts
BUS = "-/run/dbus/system_bus_socket"
MANAGER_SOCKETS = f"-/run/systemd/private -/run/user {BUS}"
# In there are sockets of daemons that resolve names for whoever asks, past the mesh's DNS. The folders are covered, there or not
# yet: a mount over a socket goes with it, and each start of its daemon makes another
RESOLVED = "/run/systemd/resolve"
RESOLVERS = f"{RESOLVED}:ro /run/nscd:ro /run/avahi-daemon:ro"
CONFS = f"-{RESOLVED}/stub-resolv.conf -{RESOLVED}/resolv.conf"  # /etc/resolv.conf is a link to one of them


def escape(text: str) -> str:
    """As systemd-escape does: what a slice's name can not hold. `-` would make a slice below another."""
    plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:_."
    out = "".join(chr(byte) if chr(byte) in plain else f"\\x{byte:02x}" for byte in text.encode())
    return f"\\x2e{out[1:]}" if out.startswith(".") else out


def slice_of(unit: str) -> str:
    """The slice that is the unit's workload."""
    return f"{SLICES.removesuffix('.slice')}-{escape(unit.removesuffix('.service'))}.slice"


def unit_of(slice_: str) -> str:
    """The unit whose workload is that slice."""
    text = slice_.removeprefix(f"{SLICES.removesuffix('.slice')}-").removesuffix(".slice").encode()
    name = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), text)
    return f"{name.decode(errors='replace')}.service"


def python() -> str:
    """The interpreter by a path that an upgrade keeps."""
    installed = CURRENT.exists() and CURRENT.resolve() == Path(sys.prefix).resolve()
    return f"{CURRENT}/bin/python" if installed else sys.executable


def service_drop_in(unit: str, workload: str, allow_dbus: bool = False) -> str:
    """``allow_dbus``: the system's bus stays in reach."""
    lines = [
        MARK,
        "[Unit]",
        "# A restart of the agent is none of this unit's",
        f"Wants={AGENT}",
        "# The programs end with that mount, which a restart of the agent leaves alone",
        f"BindsTo={PINS}",
        f"After={AGENT} {PINS}",
        "",
        "[Service]",
        f"Slice={slice_of(unit)}",
        "# Before anything else of it: not until the agent enforces and serves it",
        f"ExecCondition=+{python()} -I {AWAITING}{workload}",
        "# It keeps its cgroup, so its identity (threats: the file system, new privileges, tracing, the service manager)",
        "ProtectControlGroups=yes",
        "NoNewPrivileges=yes",
        f"CapabilityBoundingSet=~{STRONG}",
        "RestrictNamespaces=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelTunables=yes",
        "InaccessiblePaths=-/run/pillion",
        f"InaccessiblePaths={MANAGER_SOCKETS.removesuffix(BUS).strip() if allow_dbus else MANAGER_SOCKETS}",
        "# Names are the mesh's DNS's to answer",
        f"TemporaryFileSystem={RESOLVERS}",
        f"BindReadOnlyPaths={CONFS}",
    ]
    return "\n".join(lines) + "\n"


def socket_drop_in(unit: str, workload: str) -> str:
    """For a unit that opens the service's sockets: in its cgroup, and not before it is enforced."""
    return "\n".join(
        (
            MARK,
            "[Unit]",
            "# Without the default order, which has sockets before every service, so before the agent",
            "DefaultDependencies=no",
            "Requires=sysinit.target",
            f"Wants={AGENT}",
            f"BindsTo={PINS}",
            f"After=sysinit.target {AGENT} {PINS}",
            "Conflicts=shutdown.target",
            "Before=shutdown.target",
            "",
            "[Socket]",
            f"Slice={slice_of(unit)}",
            f"ExecStartPre=+{python()} -I {AWAITING}{workload}",
            "",
        )
    )


def slice_unit(unit: str) -> str:
    """There is nothing to it but its place."""
    text = f"Description=Pillion: {unit} as a workload of the mesh\n# There before the agent looks who is here\nBefore={AGENT}"
    return f"{MARK}\n[Unit]\n{text}\n\n[Slice]\n"
