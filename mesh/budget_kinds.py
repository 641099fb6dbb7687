"""What operators write about budgets: MeshConfig's ``budgets`` and the kind IdentityBudget."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mesh.fields import Principals, fault
from mesh.resource import Model, Resource

Connections = Annotated[int, Field(ge=1, le=32768)]
Streams = Annotated[int, Field(ge=1, le=65536)]
BytesInFlight = Annotated[int, Field(ge=1 << 20, le=16 << 30)]
Descriptors = Annotated[int, Field(ge=2, le=131072)]
PerSecond = Annotated[int, Field(ge=1, le=1_000_000)]
Share = Annotated[float, Field(ge=0.01, le=1.0, allow_inf_nan=False)]


class BudgetsSpec(Model):
    """For each identity on each worker of a node's proxy. What is not written: the mesh's, or the default."""

    connections: Connections | None = None
    streams: Streams | None = None
    bytes_in_flight: BytesInFlight | None = None
    descriptors: Descriptors | None = None
    requests_per_second: PerSecond | None = None
    handshakes_per_second: PerSecond | None = None
    worker_share: Share | None = None


class IdentityBudgetSpec(Model):
    principals: Principals = []
    budgets: BudgetsSpec

    @model_validator(mode="after")
    def _says_something(self) -> IdentityBudgetSpec:
        if not self.budgets.model_fields_set:
            raise fault("the budget names no limit", "write at least one, such as requestsPerSecond")
        return self


class IdentityBudget(Resource):
    """Other budgets for identities of its namespace (in the root namespace: of any). No principals: all of them."""

    api_version: Literal["mesh.pillion.dev/v1alpha1"]
    kind: Literal["IdentityBudget"]
    spec: IdentityBudgetSpec
