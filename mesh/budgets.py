"""What one identity may take of a node's proxy, and which budget holds for whom. Pure; `l7proxy.budget` enforces it."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from mesh.identity import IdentityError, SpiffeId
from mesh.matching import is_for
from mesh.model import Budget, BudgetChange, IdentityBudget

__all__ = ["Budget", "BudgetTable"]


class BudgetTable:
    """The budget of any identity, under one configuration."""

    def __init__(self, default: Budget, root_namespace: str, changes: Iterable[IdentityBudget]) -> None:
        self._default, self._root = default, root_namespace
        self._changes = sorted(changes, key=lambda item: (item.namespace, item.name))
        self._known: dict[str, Budget] = {}

    def of(self, spiffe: str | None) -> Budget:
        """The mesh's, with each field that an IdentityBudget selecting the identity names: of several, the smallest."""
        if not spiffe or not self._changes:
            return self._default
        found = self._known.get(spiffe)
        if found is None:
            found = self._known[spiffe] = self._make(spiffe)
        return found

    def _make(self, spiffe: str) -> Budget:
        try:
            identity = SpiffeId.parse(spiffe)
        except IdentityError:
            return self._default
        named: dict[str, float] = {}
        for item in self._changes:
            if not is_for(identity, item.namespace, item.principals, self._root):
                continue
            for field in BudgetChange.__struct_fields__:
                value = getattr(item.budgets, field)
                if value is not None:
                    named[field] = min(value, named.get(field, value))
        return msgspec.structs.replace(self._default, **named)
