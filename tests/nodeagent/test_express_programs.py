"""Programs through the states of a mesh: numbers, places and names stay, what is decided does not."""

from __future__ import annotations

import pytest

from mesh.model import Action, BudgetChange, IdentityBudget, Operation, Policy, Rule, Source
from nodeagent import express_programs
from nodeagent.express_programs import ENDPOINTS_MAX, Key, Program, Programs
from tests.mesh.build import policy, workload
from tests.mesh.express.build import KEY, WEB, allow, deny
from tests.nodeagent.express_fakes import ADDRESS, NETNS, VIP, Kernel, view, world

WEB2 = "Workload/shop/web-2"
ASK = Key(400, KEY, 80)


def programs(kernel: Kernel) -> tuple[Programs, list[Program]]:
    moved: list[Program] = []
    return Programs(kernel, moved.append), moved


def test_there_is_none_before_there_is_a_state() -> None:
    made, _ = programs(Kernel())
    assert made.get(ASK) is None


def test_a_program_is_made_when_it_is_asked_for_and_valid_under_its_generation() -> None:
    kernel = Kernel()
    made, _ = programs(kernel)
    made.move(view(world(), generation=7))
    assert not kernel.programs
    found = made.get(ASK)
    assert found is not None and not found.reason and found.states > 0
    assert kernel.programs[found.index]["generation"] == 7
    assert kernel.programs[found.index]["endpoints"] == [300]
    assert kernel.calls == [("drop", 1), ("verdicts", 1), ("put", 1)]  # never valid with another's verdicts
    assert {(v.name, v.groups) for v in kernel.verdicts[1].values()} == {(0, ((1, 1),))}
    assert made.get(ASK) is found


def test_a_new_state_is_judged_anew_and_the_table_stays() -> None:
    kernel = Kernel()
    made, _ = programs(kernel)
    made.move(view(world(), generation=7))
    found = made.get(ASK)
    assert found is not None
    tables = len(kernel.installed)
    made.move(view(world(), generation=8))
    assert kernel.programs[found.index]["generation"] == 8
    assert len(kernel.installed) == tables and not kernel.released


def test_a_denied_service_has_no_verdict() -> None:
    kernel = Kernel()
    made, _ = programs(kernel)
    made.move(view(world(deny())))
    found = made.get(ASK)
    assert found is not None and not kernel.verdicts.get(found.index)


def test_another_table_takes_the_place_of_the_old_one_which_is_released() -> None:
    kernel = Kernel()
    made, _ = programs(kernel)
    made.move(view(world(), generation=1))
    assert made.get(ASK)
    made.move(view(world(allow(Operation(paths=("/a",)))), generation=2))
    assert len(kernel.installed) == 3 and kernel.released == [2 + 1000 * 2]  # the first is for responses


def test_equal_tables_stand_once_and_go_with_their_last_user() -> None:
    kernel = Kernel()
    made, _ = programs(kernel)
    made.move(view(world(), generation=1))
    assert made.get(ASK) and made.get(Key(401, KEY, 80))
    assert len(kernel.installed) == 2
    made.move(view(world(allow(Operation(paths=("/a",)))), generation=2))
    assert kernel.released == [2 + 1000 * 2]


def test_what_can_not_be_expressed_is_off_and_says_why() -> None:
    kernel = Kernel()
    made, _ = programs(kernel)
    made.move(view(world(access_log=True)))
    found = made.get(ASK)
    assert found is not None and "access log" in found.reason and found.index not in kernel.programs
    made.move(view(world(), generation=9))
    assert not found.reason and kernel.programs[found.index]["generation"] == 9


def test_endpoints_keep_their_place_while_others_come_and_go() -> None:
    kernel = Kernel()
    made, _ = programs(kernel)
    second = workload("web-2", number=301)
    made.move(view(world(second, endpoints=(WEB, WEB2)), 1, **{WEB2: 73}))
    found = made.get(ASK)
    assert found is not None
    places = {end: found.place(end) for end in ((WEB, 8080), (WEB2, 8080))}
    assert sorted(places.values()) == [0, 1]
    assert kernel.programs[found.index]["chooses"]  # by load, which is counted where it decides
    made.move(view(world(second, endpoints=(WEB2,)), 2, **{WEB2: 73}))
    assert found.place((WEB2, 8080)) == places[WEB2, 8080] and found.place((WEB, 8080)) == -1
    ids = kernel.programs[found.index]["endpoints"]
    assert ids[places[WEB2, 8080]] == 301 and ids[places[WEB, 8080]] == 0
    mask = {group[1] for verdict in kernel.verdicts[found.index].values() for group in verdict.groups}
    assert mask == {1 << places[WEB2, 8080]}
    assert not kernel.programs[found.index]["chooses"]


def test_places_are_given_again_only_after_the_pairs_were_let_go() -> None:
    kernel = Kernel()
    made, moved = programs(kernel)
    names = [f"w-{number}" for number in range(ENDPOINTS_MAX + 1)]
    for number, name in enumerate(names):
        key = f"Workload/shop/{name}"
        assert not moved
        made.move(view(world(workload(name, number=600 + number), endpoints=(key,)), number + 1, **{key: 80 + number}))
        assert made.get(ASK)
    assert [program.index for program in moved] == [1]
    assert kernel.programs[1]["endpoints"] == [600 + ENDPOINTS_MAX]


def test_verdicts_are_named_by_who_allows_and_who_serves() -> None:
    made, _ = programs(Kernel())
    made.move(view(world(allow(name="mine"), default=Action.DENY)))
    found = made.get(ASK)
    assert found is not None and found.names == [("shop/mine#0", "spiffe://mesh.local/ns/shop/sa/web")]
    made.move(view(world(allow(name="other"), default=Action.DENY), generation=8))
    assert [rule for rule, _ in found.names] == ["shop/mine#0", "shop/other#0"]  # what was counted keeps its name


def test_who_lives_here() -> None:
    known = view(world())
    assert known.by_address[("127.0.0.1", 8080)] == [WEB] and known.local == NETNS and known.number(WEB) == 300
    assert known.number("Workload/shop/none") == 0


def test_numbers_of_a_former_agents_records_are_left_alone() -> None:
    kernel = Kernel()
    made = Programs(kernel, lambda _: None, taken={1, 3})
    made.move(view(world()))
    found = [made.get(Key(identity, KEY, 80)) for identity in (400, 401, 402)]
    assert [program.index for program in found if program] == [2, 4, 5]


def test_there_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(express_programs, "PROGRAMS_MAX", 1)
    made, _ = programs(Kernel())
    made.move(view(world()))
    assert made.get(ASK) and made.get(Key(401, KEY, 80)) is None and made.get(ASK)


def test_a_budget_of_requests_that_an_operator_named_holds_in_the_kernel_too() -> None:
    """The mesh's default protects workers, which these requests do not burden."""
    kernel = Kernel()
    made, _ = programs(kernel)
    state = world()
    made.move(view(state))
    found = made.get(ASK)
    assert found is not None and kernel.programs[found.index]["rate_per_s"] == 0
    slower = IdentityBudget("slow", "shop", BudgetChange(requests_per_s=50))
    made.move(view({**state, "IdentityBudget/shop/slow": slower}, generation=9))
    put = kernel.programs[found.index]
    assert (put["rate_per_s"], put["burst"]) == (50, 50)


# ---- the caller's address


def blocks(*cidrs: str) -> Policy:
    return policy("near", Action.ALLOW, Rule((Source(ip_blocks=cidrs),)))


def test_rules_that_read_the_callers_address_have_a_program_for_each() -> None:
    kernel = Kernel()
    made, _ = programs(kernel)
    made.move(view(world(blocks("10.77.1.0/24"), default=Action.DENY)))
    inside, outside = made.of(ASK, "10.77.1.151"), made.of(ASK, "10.77.2.1")
    assert inside is not None and not inside.reason and inside.key.address == "10.77.1.151"
    assert kernel.verdicts[inside.index]
    assert outside is not None and outside is not inside and "denied" in outside.reason
    plain = made.get(ASK)
    assert plain is not None and "address" in plain.reason and plain.index not in kernel.programs
    made.move(view(world(blocks("10.77.2.0/24"), default=Action.DENY), generation=8))
    assert inside.reason and not outside.reason


def test_other_rules_have_one_for_all_addresses() -> None:
    made, _ = programs(Kernel())
    made.move(view(world()))
    assert made.of(ASK, "10.77.1.151") is made.of(ASK, "10.77.2.1") is made.get(ASK)


def test_programs_of_single_addresses_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(express_programs, "ADDRESSED_MAX", 1)
    made, _ = programs(Kernel())
    made.move(view(world(blocks("10.77.0.0/16"), default=Action.DENY)))
    assert made.of(ASK, "10.77.1.151") and made.of(ASK, "10.77.1.152") is None and made.of(ASK, "10.77.1.151")


# ---- a workload's own address


def test_what_was_dialled() -> None:
    known = view(world())
    assert known.dialled(VIP, 80, 500) == KEY
    assert known.dialled(VIP, 80, 501) == "" == known.dialled("10.1.2.3", 8080, 500)
    assert known.dialled(ADDRESS, 8080, 500) == WEB
    assert known.dialled(ADDRESS, 80, 500) == ""


def test_a_workload_dialled_by_its_own_address_is_the_only_endpoint() -> None:
    kernel = Kernel()
    made, _ = programs(kernel)
    second = workload("web-2", number=301)
    made.move(view(world(second, endpoints=(WEB, WEB2)), 1, **{WEB2: 73}))
    found = made.get(Key(400, WEB2, 8080))
    assert found is not None and not found.reason and found.current == ((WEB2, 8080),)
    assert kernel.programs[found.index]["endpoints"] == [301]
