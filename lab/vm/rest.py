"""A suite that was cut goes on: what of it is still to be run. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from lab.vm.capabilities import Outcome, Run, merge


def rest(arguments: Sequence[str], earlier: Run) -> tuple[list[str], list[Outcome]]:
    """pytest's arguments without the files that were seen to their end, what failed there first; and what stays of `earlier`.

    Of a run that was cut, the file it was in is run anew. A file of which no test is chosen is always left to be run. No
    arguments: there is nothing left, and options alone would choose every test there is."""
    cut = {each.path for each in earlier.outcomes[-1:]} if earlier.error else set()
    kept = [each for each in earlier.outcomes if each.path not in cut]
    seen = {each.path for each in kept}
    failed = [each.id for each in kept if each.message]
    left = [*failed, *(each for each in arguments if each.partition("::")[0] not in seen)]
    return left if any(".py" in each for each in left) else [], kept


def joined(kept: Sequence[Outcome], later: Sequence[Outcome]) -> list[Outcome]:
    """What failed and passes now did so at its second try; the newest are last."""
    known = {each.id for each in kept}
    return [*merge(kept, later), *(each for each in later if each.id not in known)]
