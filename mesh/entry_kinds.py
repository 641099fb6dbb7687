"""What operators write about destinations outside the mesh that are known by name: the kind ServiceEntry."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from mesh.fields import Port, Principals, Text, fault
from mesh.identity import IdentityError, check_label
from mesh.ports import RESERVED_PORTS
from mesh.resource import Model, Resource

HOSTS_MAX = 64
ENTRY_PORTS_MAX = 8
HOST_CHARS_MAX = 253
NEVER = {53: "names are the mesh's own resolver's", **dict.fromkeys(RESERVED_PORTS, "it is the mesh's own")}


def _host(value: str) -> str:
    host = value.lower().removesuffix(".")
    name = host.removeprefix("*.")
    remedy = "write a DNS name such as api.example.com, or *.example.com for all below it"
    try:
        ip_address(host)
    except ValueError:
        pass
    else:
        raise fault(f"{value!r} is an address, not a name", "open addresses by outboundAllow of MeshConfig")
    if "." not in name or len(name) > HOST_CHARS_MAX:
        raise fault(f"{value!r} is not a host outside the mesh", remedy)
    if name.endswith(".mesh"):
        raise fault(f"{value!r} is a name of the mesh", "what is inside is opened by an AuthorizationPolicy")
    try:
        for label in name.split("."):
            check_label(label.replace("_", "-"), "name")
    except IdentityError as error:
        raise fault(f"{value!r} is not a host: {error}", remedy) from error
    return host


Host = Annotated[Text, AfterValidator(_host)]


class EntryPort(Model):
    """What is spoken there is carried as it is; only UDP is told apart."""

    number: Port
    protocol: Literal["TCP", "UDP", "TLS", "HTTP", "HTTPS"] = "TCP"
    name: Text = ""

    @property
    def transport(self) -> Literal["tcp", "udp"]:
        return "udp" if self.protocol == "UDP" else "tcp"

    @model_validator(mode="after")
    def _open(self) -> EntryPort:
        if self.number in NEVER:
            raise fault(f"port {self.number} can not be opened: {NEVER[self.number]}", "leave it out")
        return self


class ServiceEntrySpec(Model):
    hosts: Annotated[list[Host], Field(min_length=1, max_length=HOSTS_MAX)]
    ports: Annotated[list[EntryPort], Field(min_length=1, max_length=ENTRY_PORTS_MAX)]
    principals: Principals = []
    location: Literal["MESH_EXTERNAL"] = "MESH_EXTERNAL"
    resolution: Literal["DNS"] = "DNS"


class ServiceEntry(Resource):
    """Hosts outside the mesh that identities of its namespace (in the root namespace: of any) may ask for, and reach at the
    addresses the mesh's resolver answers. No principals: all of them."""

    api_version: Literal["mesh.pillion.dev/v1alpha1"]
    kind: Literal["ServiceEntry"]
    spec: ServiceEntrySpec
