"""One load: check the pins' schema, compile, verify everything, and only then touch what is attached."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from nodeagent import cgroups, netns
from nodeagent.libbpf import is_bpffs
from nodeagent.loader import attach, child, source
from nodeagent.loader.attach import HOOKS, LoadError, SchemaError
from nodeagent.loader.layouts import layout_of, name_of, nested

MAPS = (
    "config", "members", "sources", "dests", "backends", "policy", "listeners", "dials", "egress", "grants", "arriving", "usage",
    "datagrams", "origins", "callers", "conns", "peers", "xends", "xrecords", "xheads", "xlegs", "xloads", "counters", "events",
    "shapes",
)  # fmt: skip
WITHOUT_LAYOUT = ("events",)  # its records are struct pl_event
ROLES = {"agent": "PL_ROLE_AGENT", "proxy": "PL_ROLE_PROXY"}  # cgroups under --cgroup, by convention


def load(cgroup: Path, directory: Path, folder: Path, layouts_path: Path) -> dict[str, bool]:
    """Program name -> attached. Raises LoadError; what was attached before then still is."""
    if not is_bpffs(directory):
        raise LoadError(f"{directory} is not a bpffs: mount -t bpf bpf {directory} -o mode=0700")
    if not (cgroup / "cgroup.procs").exists():
        raise LoadError(f"{cgroup} is not a cgroup2 directory")
    types = (folder / "types.h").read_text()
    constants = source.constants(types)
    for name in ("maps", "links", "progs"):
        (directory / name).mkdir(mode=0o700, exist_ok=True)
    check_schema(directory, constants["PL_SCHEMA"])
    before = {path.name for path in (directory / "maps").iterdir()}
    try:
        with child.compiled(child.join(folder, directory / "maps", source.FILES)) as module:
            described = describe({name: types_of(module, name) for name in MAPS if name not in WITHOUT_LAYOUT}, types)
            check_sizes(directory, described)
            fds = {
                name: module.load_func(f"on_{name}", hook.prog_type, None, hook.attach_type).fd for name, hook in HOOKS.items()
            }
            seed(cgroup, directory, described)
            child.write_layouts(layouts_path, described)
            for name, fd in fds.items():
                attach.attach(name, fd, cgroup, directory)
                attach.pin(fd, directory / "progs" / name)
    except LoadError:
        forget_new(directory, before)
        raise
    except Exception as error:  # BCC raises bare Exception
        forget_new(directory, before)
        raise LoadError(f"the programs do not load: {error}") from error
    remove_stale(directory)
    return dict.fromkeys(HOOKS, True)


def check_schema(directory: Path, schema: int) -> None:
    """Raises SchemaError when the pinned maps say another schema. A zero is a load that did not finish."""
    fd = attach.open_pin(directory / "maps" / "config")
    if fd is None:
        return
    try:
        value = attach.read_map(fd, bytes(4), attach.map_info(fd).value_size)
    finally:
        os.close(fd)
    found = struct.unpack_from("<I", value)[0] if value else 0
    if found not in (0, schema):
        raise SchemaError(
            f"the maps pinned under {directory} have schema {found}, this version has {schema}: drain the node, "
            f"then run the loader with --unload and start again"
        )


def check_sizes(directory: Path, described: dict[str, Any]) -> None:
    """The same for sizes, should somebody have forgotten to bump the number."""
    for name, entry in described["maps"].items():
        fd = attach.open_pin(directory / "maps" / name)
        if fd is None:
            raise LoadError(f"map {name} was not pinned; this is a bug")
        try:
            info = attach.map_info(fd)
        finally:
            os.close(fd)
        entry["type"], entry["max_entries"] = info.type, info.max_entries
        if "leaf" in entry and (info.key_size, info.value_size) != (entry["key"]["size"], entry["leaf"]["size"]):
            raise SchemaError(
                f"the map {name} pinned under {directory} has other sizes than this version's: --unload, then start again"
            )


def types_of(module: Any, name: str) -> tuple[Any, Any]:
    """Key and leaf as ctypes. BCC's own table classes do not know every map type."""
    from bcc import BPF, lib

    raw = (lib.bpf_table_key_desc(module.module, name.encode()), lib.bpf_table_leaf_desc(module.module, name.encode()))
    key, leaf = (BPF._decode_table_type(json.loads(text)) for text in raw)
    return key, leaf


def describe(tables: dict[str, tuple[Any, Any]], types: str) -> dict[str, Any]:
    """What layouts.json holds, see nodeagent/loader/layouts.py."""
    maps: dict[str, Any] = {name: {} for name in WITHOUT_LAYOUT}
    structs: dict[str, Any] = {}
    for name, (key, leaf) in tables.items():
        maps[name] = {"key": layout_of(key), "leaf": layout_of(leaf), "key_struct": name_of(key), "leaf_struct": name_of(leaf)}
        structs |= nested(key) | nested(leaf)
    return {
        "schema": source.constants(types)["PL_SCHEMA"],
        "maps": maps,
        "structs": structs,
        "reasons": source.reasons(types),
        "constants": source.constants(types),
    }


def seed(cgroup: Path, directory: Path, described: dict[str, Any]) -> None:
    """In fresh maps, say who agent and proxy are before anything is enforced, or the agent would lock itself out."""
    fds = {name: attach.open_pin(directory / "maps" / name) for name in ("config", "members")}
    config, members = fds["config"], fds["members"]
    if config is None or members is None:
        raise LoadError("config and members are not pinned; this is a bug")
    try:
        layout = described["structs"]["pl_config"]
        value = attach.read_map(config, bytes(4), layout["size"])
        if value is not None and any(value):
            return
        depth = cgroups.level(cgroup)
        fields = {
            "schema": described["schema"],
            "generation": 1,
            "level_lo": depth + 1,
            "level_hi": depth + 2,
            "host_netns": netns.cookie_here(),
        }
        roles = {cgroup / name: role for name, role in ROLES.items()}
        roles[cgroups.agent_path()] = ROLES["agent"]  # whose child this is
        for path, role in roles.items():
            if path.is_dir() and cgroup in path.parents:
                member = pack(described["structs"]["pl_member"], {"role": described["constants"][role]})
                attach.write_map(members, struct.pack("<Q", path.stat().st_ino), member)
        attach.write_map(config, bytes(4), pack(layout, fields))
    finally:
        os.close(config)
        os.close(members)


def pack(layout: dict[str, Any], values: dict[str, int]) -> bytes:
    """One struct of integers; fields not given are zero."""
    return struct.pack(layout["format"], *(values.get(name, 0) for name, *_ in layout["fields"]))


def forget_new(directory: Path, before: set[str]) -> None:
    """Take back what a failed load made: all of it if it was the first."""
    if not before:
        attach.unload(directory)
        return
    for path in (directory / "maps").iterdir():
        if path.name not in before:
            path.unlink()


def remove_stale(directory: Path) -> None:
    """Detach programs that a former version had and this one has not."""
    for kind in ("links", "progs"):
        for path in (directory / kind).iterdir():
            if path.name not in HOOKS:
                path.unlink()
