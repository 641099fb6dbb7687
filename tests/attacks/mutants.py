"""A test that cannot fail proves nothing: each attack runs again on a mesh whose defence is taken out, and must succeed there.

The product has no switch for that. A `Mutant` is a patch of its source: the harness copies the tree, replaces text that must
be there exactly once, runs a lab from the copy and gives it to the test as `broken`. How a row's file looks:

    OPEN = Mutant("connect", "connect() to our ports", ("bpf/common.h", "the text that is there", "what stands there instead"))

    @pytest.mark.attack("dial the proxy's listener")            # the name: the row in the table at the end of the run
    def test_…(mesh: Mesh, counted: Counted) -> None:
        with counted(mesh, "n1", "reserved_port"):              # the reason rises on that node, and goes into the table
            assert dial(mesh, "127.0.0.1") == "PermissionError"

    @pytest.mark.red("dial the proxy's listener", OPEN)         # the same name: this attack without this defence
    def test_…_without(broken: Mesh) -> None:
        assert dial(broken, "127.0.0.1") == "PASSED"

- The row is the number in the file's name. Several tests, or parameters, may carry one name: "stopped" means that all passed.
- The first argument of `Mutant` is its group. Mutants of one group are taken out together and share one lab (it takes some
  seconds to come up): put together what does not interfere, so that each attack's success is its own mutant's doing.
- `broken` is populated like `mesh` (tests/e2e/mesh.py), so the same function attacks both. Red tests run last, group by group,
  one lab at a time; all that they leave behind goes down with the lab.
- A patch in time for the tree as it is: when the text moves, `test_every_patch_fits` (no lab) says so in a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import Lab
from tests.conftest import SESSION
from tests.e2e.mesh import Mesh, populated, until
from tests.trees import copied

Patch = tuple[str, str, str]  # file, old, new

ALL: list[Mutant] = []


class Mutant:
    """The product without one defence. `what`: the defence, in words of the table."""

    def __init__(self, group: str, what: str, *patches: Patch) -> None:
        self.group, self.what, self.patches = group, what, patches
        ALL.append(self)

    def __repr__(self) -> str:  # pytest shows it
        return f"Mutant({self.group!r}, {self.what!r})"


def members(group: str) -> list[Mutant]:
    """Of the row files that were imported: a run of one file takes out less."""
    return [mutant for mutant in ALL if mutant.group == group]


def apply(tree: Path, mutants: Iterable[Mutant]) -> None:
    """Raises AssertionError where a text is not there exactly once."""
    for mutant in mutants:
        for name, old, new in mutant.patches:
            path = tree / name
            text = path.read_text()
            assert text.count(old) == 1, f"{mutant}: {name} holds this {text.count(old)} times, not once:\n{old}"
            path.write_text(text.replace(old, new))


def mutated(tree: Path, mutants: Iterable[Mutant]) -> Path:
    """A copy of the product at `tree`, patched."""
    apply(copied(tree), mutants)
    return tree


@contextmanager
def without(group: str, number: int, scratch: Path) -> Iterator[Mesh]:
    """A populated mesh that runs the product without the defences of a group."""
    lab = Lab(f"{SESSION}m{number}", code=mutated(scratch / "code", members(group)))
    with populated(lab, scratch) as mesh:
        yield mesh


class Counted:
    """`with counted(mesh, "n1", "spoofed"): …`: by the end of the block the reason was counted on that node, `times` or more."""

    def __init__(self) -> None:
        self.reasons: set[str] = set()

    @contextmanager
    def __call__(self, mesh: Mesh, node: str, *reasons: str, times: int = 1) -> Iterator[None]:
        """Of several reasons one suffices. Node "controller": of the refusals of the controller."""

        def now() -> float:
            if node == "controller":
                return sum(mesh.refused_by_controller(reason) for reason in reasons)
            return sum(mesh.denied(node, reason) for reason in reasons)

        before, others = now(), {} if node == "controller" else mesh.reasons(node)
        yield
        try:
            until(lambda: now() >= before + times, f"{' or '.join(reasons)} was not counted {times} times on {node}")
        except AssertionError as error:
            rose = mesh.reasons(node) - others if others else {}
            raise AssertionError(f"{error}; counted instead: {dict(rose)}") from error
        self.reasons.update(reasons)
