"""What every resource is: strict models of YAML, with metadata."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.alias_generators import to_camel

from mesh.fields import Label, Labels, ResourceName, fault, label


class Model(BaseModel):
    """Strict: no coercion, nothing unknown, no change after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, alias_generator=to_camel)


class Metadata(Model):
    name: ResourceName
    namespace: Label | None = None
    labels: Labels = {}
    annotations: Labels = {}


class Resource(Model):
    """Any resource. ``kind`` and ``api_version`` are fields of each."""

    cluster_wide: ClassVar[bool] = False
    metadata: Metadata

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def namespace(self) -> str:
        """ "default" where none is written; empty for what is cluster-wide."""
        return "" if self.cluster_wide else self.metadata.namespace or "default"

    @property
    def key(self) -> tuple[str, str, str]:
        """(kind, namespace, name)."""
        kind: str = self.kind  # type: ignore[attr-defined]  # a Literal in every subclass
        return kind, self.namespace, self.name

    @model_validator(mode="after")
    def _scope(self) -> Resource:
        if self.cluster_wide and self.metadata.namespace is not None:
            raise fault(f"{self.key[0]} belongs to no namespace", "remove metadata.namespace")
        if not self.cluster_wide:
            label(self.name)
        return self
