"""Reading and writing resources: text in, models out, or every error with its file, line, field and remedy."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mesh import yamltree
from mesh.kinds import (
    KINDS,
    PILLION_V1,
    AuthorizationPolicy,
    HTTPRoute,
    IdentityBudget,
    MeshConfig,
    NodeGrant,
    PeerAuthentication,
    Resource,
    Service,
    ServiceEntry,
    Workload,
)

__all__ = [
    "KINDS",
    "AuthorizationPolicy",
    "HTTPRoute",
    "IdentityBudget",
    "MeshConfig",
    "NodeGrant",
    "PeerAuthentication",
    "Resource",
    "ResourceError",
    "ResourceErrors",
    "Service",
    "ServiceEntry",
    "Workload",
    "dump",
    "dump_yaml",
    "from_dict",
    "load",
    "make_workload",
]

ERRORS_MAX = 100  # reported at once


@dataclass(frozen=True, slots=True)
class ResourceError:
    """One fault. ``line`` counts from 1, 0 where there is no text; ``field`` is like ``spec.ports[0].port``."""

    file: str
    line: int
    field: str
    message: str
    remedy: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.field + ': ' if self.field else ''}{self.message} ({self.remedy})"


class ResourceErrors(ValueError):
    """The operator's text is at fault; nothing of it may be applied."""

    def __init__(self, errors: Sequence[ResourceError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(str(error) for error in self.errors))


def load(text: str, filename: str = "<text>") -> list[Resource]:
    """Every resource of a YAML stream or a JSON text. Raises ResourceErrors with all that is wrong (the first 100)."""
    try:
        documents = yamltree.parse(text)
    except yamltree.YamlError as error:
        raise ResourceErrors([ResourceError(filename, error.line, "", error.message, error.remedy)]) from error
    errors: list[ResourceError] = []
    out: list[Resource] = []
    seen: dict[tuple[str, str, str], int] = {}
    for document in documents:
        resource = _read(document, filename, errors)
        if resource is not None:
            if resource.key in seen:
                message = f"{'/'.join(part for part in resource.key if part)} is also at line {seen[resource.key]}"
                errors.append(ResourceError(filename, document.line, "metadata.name", message, "keep one of them"))
            seen.setdefault(resource.key, document.line)
            out.append(resource)
        if len(errors) >= ERRORS_MAX:
            break
    if not documents:
        errors.append(ResourceError(filename, 1, "", "there is no resource", "write at least one document"))
    if errors:
        raise ResourceErrors(errors[:ERRORS_MAX])
    return out


def from_dict(data: Mapping[str, object], filename: str = "<data>") -> Resource:
    """One resource from plain data, as `dump` makes it. Raises ResourceErrors, with line 0."""
    errors: list[ResourceError] = []
    resource = _read(yamltree.Document(dict(data), 0), filename, errors)
    if resource is None:
        raise ResourceErrors(errors)
    return resource


def dump(resource: Resource) -> dict[str, Any]:
    """Plain data as the operator wrote it, with the namespace filled in."""
    data = resource.model_dump(by_alias=True, exclude_unset=True)
    metadata = data["metadata"]
    if not resource.cluster_wide:
        metadata["namespace"] = resource.namespace
    return {"apiVersion": data["apiVersion"], "kind": data["kind"], "metadata": metadata, "spec": data["spec"]}


def dump_yaml(resources: Iterable[Resource]) -> str:
    """A YAML stream that `load` reads back."""
    text: str = yaml.safe_dump_all([dump(resource) for resource in resources], sort_keys=False, explicit_start=True)
    return text


def make_workload(
    namespace: str, name: str, node: str, service_account: str, addresses: Iterable[str], labels: Mapping[str, str]
) -> Workload:
    """A Workload as an agent registers it. Raises ResourceErrors."""
    resource = from_dict(
        {
            "apiVersion": PILLION_V1,
            "kind": "Workload",
            "metadata": {"name": name, "namespace": namespace, "labels": dict(labels)},
            "spec": {"node": node, "serviceAccount": service_account, "addresses": list(addresses)},
        },
        f"workload {namespace}/{name}",
    )
    assert isinstance(resource, Workload)  # noqa: S101  # by its kind
    return resource


def _read(document: yamltree.Document, filename: str, errors: list[ResourceError]) -> Resource | None:
    def fail(path: yamltree.Path, message: str, remedy: str) -> None:
        errors.append(ResourceError(filename, document.line_of(path), yamltree.shown(path), message, remedy))

    data = document.data
    if not isinstance(data, dict):
        fail((), f"a resource is a mapping, this is {_name(data)}", "start with apiVersion, kind, metadata, spec")
        return None
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, 1)
        remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(KINDS)}"
        fail(("kind",), f"kind {kind!r} is not known" if kind is not None else "kind is missing", remedy)
        return None
    model = KINDS[kind]
    try:
        return model.model_validate(data)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            path = _path(detail["loc"], data)
            message, remedy = _explain(detail, model, path)
            fail(path, message, remedy)
        return None


def _path(loc: tuple[int | str, ...], data: object) -> yamltree.Path:
    """pydantic's location without the names of union members, which are in no text."""
    path: list[str | int] = []
    for part in loc:
        if isinstance(data, dict) and isinstance(part, str) and (part in data or part == loc[-1]):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _name(value: object) -> str:
    if value is None:
        return "empty"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return names.get(type(value), type(value).__name__)


_TYPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def _explain(detail: ErrorDetails, model: type[BaseModel], path: yamltree.Path) -> tuple[str, str]:
    """Message and remedy for one of pydantic's errors."""
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "pillion":
        return str(context["message"]), str(context["remedy"])
    if kind == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        near = difflib.get_close_matches(str(path[-1]) if path else "", known, 1)
        remedy = f"did you mean {near[0]}?" if near else f"remove it; known here: {', '.join(known) or 'nothing'}"
        return f"field {str(path[-1])[:80]!r} is not known" if path else "field is not known", remedy
    if kind == "missing":
        return "field is missing", f"add {path[-1] if path else 'it'}"
    if kind in _TYPES:
        hint = ', in quotes ("…") if it is text' if kind == "string_type" and isinstance(value, int | float | bool) else ""
        return f"expected {_TYPES[kind]}, found {_name(value)}", f"write {_TYPES[kind]}{hint}"
    if kind == "literal_error":
        return f"{str(value)[:80]!r} is not taken here", f"use {context.get('expected')}"
    if kind in ("greater_than_equal", "less_than_equal", "finite_number"):
        return f"{value} is out of range", detail["msg"][0].lower() + detail["msg"][1:]
    if kind in ("too_long", "string_too_long", "too_short"):
        limit = context.get("max_length", context.get("min_length"))
        many = kind != "too_short"
        return f"{'more' if many else 'fewer'} than {limit} {'characters' if 'string' in kind else 'entries'}", (
            "make it smaller" if many else f"give at least {limit}"
        )
    return detail["msg"], "see the resource's reference"


def _fields_at(model: type[BaseModel], path: yamltree.Path) -> list[str]:
    """The names a mapping at ``path`` may hold."""
    current: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        found = next((info for info in current.model_fields.values() if info.alias == part), None)
        current = _model_in(found.annotation) if found is not None else None
        if current is None:
            return []
    return [info.alias or name for name, info in current.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
