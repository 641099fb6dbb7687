"""The rules of the repository that a reader relies on: who imports whom, how long a module may be, who owns layouts."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = ("controller", "nodeagent", "l7proxy", "pillion")
OURS = {*PROCESSES, "mesh", "lab", "bench", "fuzz", "tests", "bpf"}
MAY_IMPORT = {
    "mesh": {"mesh"},
    "controller": {"controller", "mesh"},
    "nodeagent": {"nodeagent", "mesh"},
    "l7proxy": {"l7proxy", "mesh"},
    "pillion": {"pillion", "mesh"},
    "lab": {"lab", "mesh"},
    "bench": {"bench", "lab", "mesh"},
    "fuzz": {"fuzz", "l7proxy", "mesh"},
}
# What reaches outside the process; `mesh` is told everything it works on
IMPURE = {
    "socket",
    "os",
    "asyncio",
    "subprocess",
    "threading",
    "multiprocessing",
    "selectors",
    "ssl",
    "pathlib",
    "time",
    "signal",
}
LINES_MAX = 400


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def every(*packages):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for package in packages for path in modules(package)]


def imported(path):
    """Top-level names of everything a module imports, inside functions as well."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0], node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value.partition(".")[0], node.lineno


@pytest.mark.parametrize("path", every(*MAY_IMPORT))
def test_imports_stay_within(path):
    package = path.relative_to(ROOT).parts[0]
    foreign = [f"line {line}: {name}" for name, line in imported(path) if name in OURS - MAY_IMPORT[package]]
    assert not foreign, f"{package} imports {sorted(MAY_IMPORT[package])} of ours, nothing else"


@pytest.mark.parametrize("path", every("mesh"))
def test_mesh_is_pure(path):
    assert not [f"line {line}: {name}" for name, line in imported(path) if name in IMPURE]
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not calls & {"open", "print", "input", "exec", "eval"}


@pytest.mark.parametrize("path", every(*MAY_IMPORT))
def test_modules_can_be_read_in_one_go(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LINES_MAX, "split the module by what its parts are"


@pytest.mark.parametrize("path", every(*PROCESSES, "mesh"))
def test_no_relative_imports(path):
    tree = ast.parse(path.read_text())
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


def struct_names():
    header = (ROOT / "bpf" / "types.h").read_text()
    return {line.split()[1] for line in header.splitlines() if line.startswith("struct ") and "{" in line}


@pytest.mark.parametrize("path", every(*PROCESSES, "mesh", "lab", "bench"))
def test_layouts_live_in_c_alone(path):
    """No Python class is named like a struct of bpf/types.h and laid out by ctypes, and no struct format is written out
    beside such a name: formats come from the loader's layouts."""
    names = {name.removeprefix("pl_").replace("_", "") for name in struct_names()}
    assert names
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
            laid_out = bases & {"Structure", "BigEndianStructure", "LittleEndianStructure", "Union"}
            same = node.name.lower().replace("_", "").removeprefix("pl") in names
            assert not (laid_out and same), f"line {node.lineno}: {node.name} is a layout of bpf/types.h"
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            made = ast.unparse(node.value.func)
            target = ast.unparse(node.targets[0]).lower().replace("_", "").removeprefix("pl")
            literal = node.value.args and isinstance(node.value.args[0], ast.Constant)
            if made in ("struct.Struct", "Struct") and literal:
                assert target.removesuffix("format").removesuffix("struct") not in names, (
                    f"line {node.lineno}: layout of bpf/types.h"
                )


def test_the_rules_have_something_to_hold():
    for package in MAY_IMPORT:
        assert (ROOT / package).is_dir()
    assert modules("mesh")
