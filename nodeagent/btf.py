"""Where the running kernel keeps what bpf/express*.c reads of its structures: byte offsets from its own type information
(BTF), by libbpf."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

from nodeagent.libbpf import libbpf

SYMBOLS = Path("/proc/kallsyms")
_STRUCT, _ENUM, _SKIPPED = 4, 6, (8, 9, 10, 11, 18)  # BTF_KIND_*; typedef, volatile, const, restrict, type tag
_SOCK = "inet_conn.icsk_inet.sk"
WANTED = {
    "O_WRITE_SEQ": ("tcp_sock", "write_seq"),
    "O_RCV_NXT": ("tcp_sock", "rcv_nxt"),
    "O_COPIED_SEQ": ("tcp_sock", "copied_seq"),
    "O_ULP": ("tcp_sock", "inet_conn.icsk_ulp_ops"),
    "O_QUEUE_LEN": ("tcp_sock", f"{_SOCK}.sk_receive_queue.qlen"),
    "O_USER_DATA": ("tcp_sock", f"{_SOCK}.sk_user_data"),
    "O_LOWAT": ("tcp_sock", f"{_SOCK}.sk_rcvlowat"),
    "O_PEEK_OFF": ("tcp_sock", f"{_SOCK}.sk_peek_off"),
    "O_FLAGS": ("tcp_sock", f"{_SOCK}.__sk_common.skc_flags"),
    "O_OWNED": ("tcp_sock", f"{_SOCK}.sk_lock.owned"),
    "O_WQ": ("tcp_sock", f"{_SOCK}.sk_wq"),
    "O_REFS": ("tcp_sock", f"{_SOCK}.__sk_common.skc_refcnt"),
    "O_INGRESS_MSG": ("sk_psock", "ingress_msg"),
    "O_INGRESS_SKB_LEN": ("sk_psock", "ingress_skb.qlen"),
    "O_PSOCK_REFS": ("sk_psock", "refcnt"),
    "O_TASK_STATE": ("task_struct", "__state"),
    "O_TASK_PID": ("task_struct", "pid"),
    "O_TASK_UTIME": ("task_struct", "utime"),
    "O_MSG_LIST": ("sk_msg", "list"),
    "O_MSG_SIZE": ("sk_msg", "sg.size"),
    "O_MSG_SKB": ("sk_msg", "skb"),
    "O_WQ_HEAD": ("socket_wq", "wait.head"),
    "O_WQE_FUNC": ("wait_queue_entry", "func"),
    "O_WQE_PRIVATE": ("wait_queue_entry", "private"),
    "O_WQE_ENTRY": ("wait_queue_entry", "entry"),
}
WANTED_TO_COUNT = {  # beside those, by bpf/express_count.c
    "O_SAVED_READY": ("sk_psock", "saved_data_ready"),
}


class NoTypes(Exception):
    """The kernel does not describe itself, or not what we need."""


class Btf:
    """The running kernel's types."""

    def __init__(self) -> None:
        for name in ("btf__load_vmlinux_btf", "btf__type_by_id", "btf__name_by_offset"):
            getattr(libbpf, name).restype = ctypes.c_void_p
        libbpf.btf__type_by_id.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        libbpf.btf__name_by_offset.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        libbpf.btf__find_by_name_kind.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32]
        libbpf.btf__free.argtypes = [ctypes.c_void_p]
        self._btf = libbpf.btf__load_vmlinux_btf()
        if not self._btf:
            raise NoTypes("the kernel has no BTF (/sys/kernel/btf/vmlinux): it was built without CONFIG_DEBUG_INFO_BTF")

    def close(self) -> None:
        libbpf.btf__free(self._btf)

    def offset(self, struct: str, path: str) -> int:
        """Bytes from the start of ``struct`` to the field ``a.b.c``. Raises NoTypes."""
        found = int(libbpf.btf__find_by_name_kind(self._btf, struct.encode(), _STRUCT))
        if found < 0:
            raise NoTypes(f"the kernel has no struct {struct}")
        bits, type_id = 0, found
        for part in path.split("."):
            member = self._member(self._resolved(type_id), part)
            if member is None:
                raise NoTypes(f"the kernel's struct {struct} has no {path}")
            bits, type_id = bits + member[0], member[1]
        return bits // 8

    def number(self, enum: str, name: str) -> int:
        """Of one name of an enum. Raises NoTypes."""
        found = int(libbpf.btf__find_by_name_kind(self._btf, enum.encode(), _ENUM))
        if found >= 0:
            place, info, _ = self._type(found)
            for index in range(info & 0xFFFF):
                name_at, value = (ctypes.c_uint32 * 2).from_address(place + 12 + 8 * index)
                if ctypes.string_at(libbpf.btf__name_by_offset(self._btf, name_at)).decode() == name:
                    return int(value)
        raise NoTypes(f"the kernel's enum {enum} has no {name}")

    def _type(self, type_id: int) -> tuple[int, int, int]:
        """Address of struct btf_type, its info, and its size or type."""
        place = libbpf.btf__type_by_id(self._btf, type_id)
        if not place:
            raise NoTypes(f"the kernel's BTF has no type {type_id}")
        _, info, size_or_type = (ctypes.c_uint32 * 3).from_address(place)
        return place, info, size_or_type

    def _resolved(self, type_id: int) -> int:
        """Without typedefs and qualifiers."""
        _, info, following = self._type(type_id)
        return self._resolved(following) if info >> 24 & 31 in _SKIPPED else type_id

    def _member(self, type_id: int, wanted: str) -> tuple[int, int] | None:
        """(bits from the start, type), also out of unnamed structs and unions inside."""
        place, info, _ = self._type(type_id)
        for index in range(info & 0xFFFF):
            name_at, member_type, at = (ctypes.c_uint32 * 3).from_address(place + 12 + 12 * index)
            bits = at & 0xFFFFFF if info >> 31 else at
            name = ctypes.string_at(libbpf.btf__name_by_offset(self._btf, name_at)).decode()
            if name == wanted:
                return bits, member_type
            if not name:
                inner = self._resolved(member_type)
                if self._type(inner)[1] >> 24 & 31 in (_STRUCT, _STRUCT + 1):
                    found = self._member(inner, wanted)
                    if found is not None:
                        return bits + found[0], found[1]
        return None


def offsets(wanted: Mapping[str, tuple[str, str]] = WANTED) -> dict[str, int]:
    """Everything wanted, bytes. Raises NoTypes."""
    btf = Btf()
    try:
        return {name: btf.offset(*where) for name, where in wanted.items()}
    finally:
        btf.close()


def number(enum: str, name: str) -> int:
    """Of one name of an enum. Raises NoTypes."""
    btf = Btf()
    try:
        return btf.number(enum, name)
    finally:
        btf.close()


def symbol(name: str, table: Path = SYMBOLS) -> int:
    """The address of a kernel function; 0 where the kernel does not tell."""
    for line in table.read_text().splitlines():
        address, _, rest = line.partition(" ")
        if rest.split()[1:] == [name]:
            return int(address, 16)
    return 0
