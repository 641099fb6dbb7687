"""Stands in for BCC in a VM in emulation, where compiling takes minutes and is not what is looked at: what was compiled once,
from the same text, is loaded into the VM's own kernel, maps and programs, and judged by its verifier. A text that nobody has
compiled goes to the distribution's BCC, and what that makes is kept. It has what nodeagent's loaders use and nothing else.

What it is worth, of the guest's CPU for one load of the main programs on 6.1 under TCG: 6 s, 228 s without it.
"""

from __future__ import annotations

import base64
import ctypes
import fcntl
import hashlib
import importlib
import json
import os
import re
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REAL = "/usr/lib/python3/dist-packages"
ASIDE = "/usr/lib/python3/aside"  # where it is on a machine of the VM lab: there, this has its place
MADE_BEFORE = Path(__file__).with_name("compiled")
MADE_HERE = Path(os.environ.get("PILLION_COMPILED", "/var/tmp/pillion-compiled"))  # of a VM
BPF_SYSCALL = 321  # x86-64
MAP_CREATE, PROG_LOAD, OBJ_PIN, OBJ_GET, INFO_BY_FD, BTF_LOAD = 0, 5, 6, 7, 15, 18
SK_STORAGE = 24  # the one type of map that must have BTF
LOG_BYTES = 1 << 24
PINS = re.compile(r'^#define PL_PINS "(.*)"$', re.MULTILINE)
ATTACHED_BY_NAME = "kretfunc__"  # BCC attaches it to a kernel's function: not kept
LOAD_IMM64, PSEUDO_MAP_FD = 0x18, 1
TYPES = {
    "_Bool": ctypes.c_bool, "char": ctypes.c_char, "signed char": ctypes.c_byte, "unsigned char": ctypes.c_ubyte,
    "short": ctypes.c_short, "unsigned short": ctypes.c_ushort, "int": ctypes.c_int, "unsigned int": ctypes.c_uint,
    "long": ctypes.c_long, "unsigned long": ctypes.c_ulong, "long long": ctypes.c_longlong,
    "unsigned long long": ctypes.c_ulonglong,
}  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


def syscall(command: int, attributes: bytes, what: str) -> int:
    """bpf(2). Raises OSError."""
    buffer = ctypes.create_string_buffer(attributes, 144)
    result = int(_libc.syscall(BPF_SYSCALL, command, buffer, 144))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def place_of(key: str) -> Path | None:
    return next((each for each in (MADE_BEFORE / key, MADE_HERE / key) if each.exists()), None)


class BPF:
    """BPF(text=…, cflags=…): a module as BCC's."""

    def __new__(cls, text: str, cflags: Sequence[str] = ()) -> Any:
        if any(each.partition("=")[2].startswith(ATTACHED_BY_NAME) for each in cflags):
            return real().BPF(text=text, cflags=list(cflags))
        pins = found[1] if (found := PINS.search(text)) else ""
        same = PINS.sub("", text) + "\0" + "\0".join(cflags)
        key = hashlib.sha256(same.encode()).hexdigest()
        if place := place_of(key):
            return Stored(json.loads(place.read_text()), pins)
        MADE_HERE.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (MADE_HERE / f".{key}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two agents start at once: one compiles, the other waits for it
            if place := place_of(key):
                return Stored(json.loads(place.read_text()), pins)
            bcc = real()
            made = bcc.BPF(text=text, cflags=list(cflags))
            fresh = MADE_HERE / f".{key}.{os.getpid()}"
            fresh.write_text(json.dumps(record(bcc.lib, made.module, pins)))
            fresh.rename(MADE_HERE / key)
        return made

    @staticmethod
    def _decode_table_type(desc: Any) -> Any:
        """Of a type's description, ctypes."""
        if isinstance(desc, str):
            return TYPES[desc]
        name, members, kind = desc
        fields = []
        for member in members:
            if len(member) == 3 and not isinstance(member[2], list):
                raise ValueError(f"{name}: no bit fields, no nameless members")
            type_ = BPF._decode_table_type(member[1])
            fields.append((member[0], type_ * member[2][0] if len(member) == 3 else type_))
        packed = {"_pack_": 1} if kind == "struct_packed" else {}
        return type(str(name), (ctypes.Union if kind == "union" else ctypes.Structure,), {**packed, "_fields_": fields})


def real() -> Any:
    """The distribution's package, from now on under its name."""
    for name in [each for each in sys.modules if each == "bcc" or each.startswith("bcc.")]:
        del sys.modules[name]
    place = ASIDE if os.path.isdir(f"{ASIDE}/bcc") else REAL
    sys.path.insert(0, place)
    importlib.invalidate_caches()
    try:
        return importlib.import_module("bcc")
    finally:
        sys.path.remove(place)


# ---- keep


def record(real_lib: Any, module: Any, pins: str) -> dict[str, Any]:
    """Everything that `Stored` needs of a module that BCC made."""
    real_lib.bpf_num_tables.restype, real_lib.bpf_num_tables.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    real_lib.bpf_table_name.restype, real_lib.bpf_table_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_size_t]
    maps, by_fd = [], {}
    for number in range(real_lib.bpf_num_tables(module)):
        name = real_lib.bpf_table_name(module, number)
        fd = real_lib.bpf_table_fd(module, name)
        by_fd[fd] = name.decode()
        maps.append(
            {
                "name": name.decode(),
                "shape": shape_of(fd),
                "pinned": bool(pins) and os.path.exists(pins + name.decode()),
                "key": real_lib.bpf_table_key_desc(module, name).decode(),
                "leaf": real_lib.bpf_table_leaf_desc(module, name).decode(),
            }
        )
    programs = {}
    for number in range(real_lib.bpf_num_functions(module)):
        name = real_lib.bpf_function_name(module, number)
        code = ctypes.string_at(real_lib.bpf_function_start(module, name), real_lib.bpf_function_size(module, name))
        programs[name.decode()] = {"code": base64.b64encode(code).decode(), "maps": references(code, by_fd)}
    return {"license": real_lib.bpf_module_license(module).decode(), "maps": maps, "programs": programs}


def shape_of(fd: int) -> list[int]:
    """type, key size, value size, entries, flags."""
    info = ctypes.create_string_buffer(88)
    syscall(INFO_BY_FD, struct.pack("<IIQ", fd, len(info), ctypes.addressof(info)), "map info")
    kind, _, key, value, entries, flags = struct.unpack_from("<6I", info)
    return [kind, key, value, entries, flags]


def references(code: bytes, by_fd: dict[int, str]) -> list[tuple[int, str]]:
    """(offset, map) of each instruction that names a map."""
    found = []
    for offset in range(0, len(code), 8):
        operation, registers, _, value = struct.unpack_from("<BBhi", code, offset)
        if operation == LOAD_IMM64 and registers >> 4:
            if registers >> 4 != PSEUDO_MAP_FD:
                raise ValueError(f"an instruction of kind {registers >> 4} can not be kept")
            found.append((offset, by_fd[value]))
    return found


# ---- load


class Function:
    def __init__(self, fd: int) -> None:
        self.fd = fd


class Table:
    def __init__(self, key: Any, leaf: Any) -> None:
        self.Key, self.Leaf = key, leaf


class Stored:
    """What was kept, in this kernel. Like BCC's it keeps its descriptors to the process's end."""

    def __init__(self, kept: dict[str, Any], pins: str) -> None:
        self._kept = kept
        self.maps = {each["name"]: each for each in kept["maps"]}
        self.fds = {name: open_or_make(each, pins) for name, each in self.maps.items()}
        self.module = self  # what `lib` is given

    def load_func(self, name: str, prog_type: int, device: None = None, attach_type: int = 0) -> Function:
        kept = self._kept["programs"].get(name)
        if kept is None or device is not None:
            raise ValueError(f"Unknown program {name}")
        code = bytearray(base64.b64decode(kept["code"]))
        for offset, map_name in kept["maps"]:
            struct.pack_into("<i", code, offset + 4, self.fds[map_name])
        return Function(load(name, prog_type, max(attach_type, 0), bytes(code), self._kept["license"]))

    def get_table(self, name: str) -> Table:
        found = self.maps[name]
        return Table(*(BPF._decode_table_type(json.loads(found[each])) for each in ("key", "leaf")))


class _Lib:
    """Of libbcc, what takes a module."""

    @staticmethod
    def bpf_table_fd(module: Stored, name: bytes) -> int:
        return module.fds[name.decode()]

    @staticmethod
    def bpf_table_key_desc(module: Stored, name: bytes) -> bytes:
        return str(module.maps[name.decode()]["key"]).encode()

    @staticmethod
    def bpf_table_leaf_desc(module: Stored, name: bytes) -> bytes:
        return str(module.maps[name.decode()]["leaf"]).encode()


lib = _Lib()


def open_or_make(kept: dict[str, Any], pins: str) -> int:
    """The map's descriptor: by its pin if there is one, else made, and pinned if it was."""
    path = ctypes.create_string_buffer((pins + kept["name"]).encode())
    if kept["pinned"] and os.path.exists(pins + kept["name"]):
        return syscall(OBJ_GET, struct.pack("<Q", ctypes.addressof(path)), path.value.decode())
    kind, key, value, entries, flags = kept["shape"]
    attributes = struct.pack("<7I16sI", kind, key, value, entries, flags, 0, 0, kept["name"][:15].encode(), 0)
    if kind == SK_STORAGE:
        attributes += struct.pack("<3I", types_of_storage(value), 1, 3)
    fd = syscall(MAP_CREATE, attributes, f"map {kept['name']}")
    if kept["pinned"]:
        syscall(OBJ_PIN, struct.pack("<QI", ctypes.addressof(path), fd), path.value.decode())
    return fd


def types_of_storage(size: int) -> int:
    """BTF: 1 an int, 3 an array of so many bytes."""
    strings = b"\0int\0char\0"
    types = struct.pack("<4I", 1, 1 << 24, 4, 1 << 24 | 32) + struct.pack("<4I", 5, 1 << 24, 1, 8)
    types += struct.pack("<6I", 0, 3 << 24, 0, 2, 1, size)
    head = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    data = ctypes.create_string_buffer(head + types + strings, len(head + types + strings))
    return syscall(BTF_LOAD, struct.pack("<QQI", ctypes.addressof(data), 0, len(data)), "btf")


def load(name: str, prog_type: int, attach_type: int, code: bytes, license: str) -> int:
    """Raises OSError with the verifier's last words."""
    program, terms = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(license.encode())

    def attributes(level: int, log: int, size: int) -> bytes:
        head = struct.pack(
            "<IIQQIIQ", prog_type, len(code) // 8, ctypes.addressof(program), ctypes.addressof(terms), level, size, log
        )
        return head + struct.pack("<II16sII", 0, 0, name[:15].encode(), 0, attach_type)

    try:
        return syscall(PROG_LOAD, attributes(0, 0, 0), name)
    except OSError:
        said = ctypes.create_string_buffer(LOG_BYTES)
        try:
            return syscall(PROG_LOAD, attributes(1, ctypes.addressof(said), LOG_BYTES), name)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: {said.value.decode(errors='replace')[-1500:]}") from None
