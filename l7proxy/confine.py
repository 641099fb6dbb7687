"""How the proxy gives up what it will not need: from root to a process with no network, no capability, no way back.

The order matters: the namespace while there is CAP_SYS_ADMIN, the bounding set while there is CAP_SETPCAP, then the
user, then what remains of the sets, then the filter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import resource

from l7proxy import seccomp

DEFAULT_USER = "pillion-proxy"
DEFAULT_UID = 65471  # where the default user does not exist
OPEN_FILES_MAX = 1 << 20

_CLONE_NEWNET = 0x40000000
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_SET_PDEATHSIG = 4, 38, 24, 47, 1
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522


class ConfineError(Exception):
    """A step failed: the proxy must not start. The message says which, and what to do."""


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(*arguments: int) -> int:
    values = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:5]]
    return 0 if _libc().prctl(*values) >= 0 else ctypes.get_errno()


def user_ids(user: str | None) -> tuple[int, int]:
    """(uid, gid) of a name or number; without one, of `DEFAULT_USER` or `DEFAULT_UID`. Raises ConfineError for root."""
    text = user or DEFAULT_USER
    try:
        entry = pwd.getpwuid(int(text)) if text.isdigit() else pwd.getpwnam(text)
        ids = entry.pw_uid, entry.pw_gid
    except KeyError:
        if text.isdigit():
            ids = int(text), int(text)
        elif user is None or user == DEFAULT_USER:
            ids = DEFAULT_UID, DEFAULT_UID
        else:
            raise ConfineError(f"no user {text!r}; create it, or give --user a number") from None
    if 0 in ids:
        raise ConfineError("the proxy does not run as root; give --user another user")
    return ids


def _empty_netns() -> None:
    """A service manager that takes the right to make one (PrivateNetwork=) has given us one."""
    if _libc().unshare(_CLONE_NEWNET):
        error = ctypes.get_errno()
        with open("/proc/self/net/dev") as text:
            interfaces = {line.partition(":")[0].strip() for line in text.readlines()[2:]}
        if error != errno.EPERM or interfaces - {"lo"}:
            raise ConfineError(f"unshare(CLONE_NEWNET): {os.strerror(error)}; start the proxy as root")


def _limits() -> None:
    with open("/proc/sys/fs/nr_open") as text:
        files = min(OPEN_FILES_MAX, int(text.read()))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    except (ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _drop_bounding_set() -> None:
    for capability in range(64):
        error = _prctl(_PR_CAPBSET_DROP, capability)
        if error == errno.EINVAL:
            return  # past the last one this kernel knows
        if error:
            raise ConfineError(f"dropping capability {capability}: {os.strerror(error)}; start the proxy as root")


def _become(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _drop_capabilities() -> None:
    if error := _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL):
        raise ConfineError(f"clearing the ambient capabilities: {os.strerror(error)}")
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    if _libc().capset(header, (ctypes.c_uint32 * 6)()):
        raise ConfineError(f"capset: {os.strerror(ctypes.get_errno())}")


def status() -> dict[str, str]:
    """/proc/self/status, field by field."""
    with open("/proc/self/status") as text:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in text)}


def _check(uid: int) -> None:
    """Trust the kernel's own word, not ours."""
    found = status()
    held = [name for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb") if int(found[name], 16)]
    if held or found["Uid"].split() != [str(uid)] * 4 or found["NoNewPrivs"] != "1" or found["Seccomp"] != "2":
        raise ConfineError(f"confinement is incomplete: {held or found}")


def confine(uid: int, gid: int) -> None:
    """Give up everything, for this process and its children. Raises ConfineError or OSError; then exit."""
    _empty_netns()
    _limits()
    _drop_bounding_set()
    _become(uid, gid)
    _drop_capabilities()
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_DUMPABLE, 0)):
        if error := _prctl(option, value):
            raise ConfineError(f"prctl({option}): {os.strerror(error)}")
    seccomp.install()
    _check(uid)


def die_with_parent(signal: int) -> None:
    """This child gets ``signal`` when the process that forked it is gone, however it went."""
    _prctl(_PR_SET_PDEATHSIG, signal)


def live_without_parent() -> None:
    """It takes that back."""
    _prctl(_PR_SET_PDEATHSIG, 0)
