"""The values of resource fields: validated types, each with an error that says what to write instead."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from mesh.addresses import host_port, parse_host_port
from mesh.identity import IdentityError, SpiffeId, check_label, check_trust_domain
from mesh.matching import check_regex

LABELS_MAX = 64
PRINCIPALS_MAX = 256
TEXT_CHARS_MAX = 1024
LEASE_S_MIN, LEASE_S_MAX = 3.0, 7 * 86400.0

APP_PROTOCOLS = {  # to what the mesh does with it
    name: name if name == "http" else "tcp"
    for name in ("http", "tcp", "tls", "https", "redis", "mysql", "mongo", "postgres", "postgresql", "grpc", "amqp", "kafka")
}


def fault(message: str, remedy: str) -> PydanticCustomError:
    """A validation error of ours: what is wrong, and what to do."""
    return PydanticCustomError("pillion", "{message}", {"message": message, "remedy": remedy})


def label(value: str) -> str:
    """A DNS label."""
    try:
        return check_label(value, "name")
    except IdentityError as error:
        raise fault(str(error), "use lower-case letters, digits and '-'") from error


def _resource_name(value: str) -> str:
    for part in value.split("."):
        label(part)
    return value


def _trust_domain(value: str) -> str:
    try:
        return check_trust_domain(value)
    except IdentityError as error:
        raise fault(str(error), "use a DNS name such as mesh.local") from error


def _address(value: str) -> str:
    try:
        ip = ipaddress.ip_address(value)
    except ValueError as error:
        raise fault(f"{value!r} is not an IP address", "write an address such as 10.0.0.7 or fd00::7") from error
    if str(ip) != value or (isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped or ip.scope_id)):
        raise fault(f"{value!r} is not the canonical form of an address", f"write {getattr(ip, 'ipv4_mapped', None) or ip}")
    if ip.is_loopback or ip.is_multicast or ip.is_unspecified or ip.is_link_local:
        raise fault(f"{value} can not be a workload's address", "use an address other machines could reach")
    return value


def _cidr(value: str) -> str:
    try:
        network = ipaddress.ip_network(value)
    except ValueError as error:
        raise fault(
            f"{value!r} is not an address range: {error}", "write a range such as 10.0.0.0/8, no host bits set"
        ) from error
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(ipaddress.IPv6Network("::ffff:0:0/96")):
        raise fault(f"{value} is IPv4 in disguise", "write the IPv4 range")
    return str(network)


def _endpoint(value: str) -> str:
    try:
        return host_port(*parse_host_port(value))
    except ValueError as error:
        raise fault(f"{value!r} is not address:port", "write it as 10.0.0.53:53 or [fd00::53]:53") from error


def _pattern(value: str) -> str:
    if not value or "*" in value[1:-1] or (value.count("*") > 1):
        raise fault(f"{value!r} is not a pattern", "'*' may stand alone, first or last, once")
    return value


def _principal(value: str) -> str:
    if value.startswith("spiffe://"):
        raise fault("a principal is written without its scheme", f"write {value.removeprefix('spiffe://')}")
    _pattern(value)
    if "*" not in value:
        try:
            SpiffeId.parse(f"spiffe://{value}")
        except IdentityError as error:
            raise fault(
                f"{value!r} is no workload's identity", "write <trust domain>/ns/<namespace>/sa/<service account>"
            ) from error
    return value


def _path_pattern(value: str) -> str:
    _pattern(value)
    if not value.startswith(("/", "*")):
        raise fault(f"path {value!r} does not start with '/'", "write /exact, /prefix/* or */suffix")
    if any(char in value for char in "?# \\"):
        raise fault(f"path {value!r} holds a character no canonical path has", "leave out the query, blanks and backslashes")
    return value


def _host_pattern(value: str) -> str:
    _pattern(value)
    if ":" in value and not value.startswith("["):
        raise fault(f"host {value!r} names a port", "leave the port out; use ports")
    return value.lower()


def _method(value: str) -> str:
    if not value.isascii() or not value.isalpha() or not value.isupper():
        raise fault(f"{value!r} is not a method", "write it in capitals, such as GET")
    return value


def _header_name(value: str) -> str:
    if not value or not all(char.isascii() and (char.isalnum() or char in "!#$%&'*+-.^_`|~") for char in value):
        raise fault(f"{value!r} is not a header name", "use letters, digits and '-'")
    return value.lower()


def _port_text(value: str | int) -> int:
    if isinstance(value, str):
        if not (value.isascii() and value.isdigit() and len(value) <= 5):
            raise fault(f"{value!r} is not a port", "write a number from 1 to 65535")
        value = int(value)
    if not 0 < value < 65536:
        raise fault(f"{value} is not a port", "write a number from 1 to 65535")
    return value


def _grant(value: str) -> str:
    namespace, slash, account = value.partition("/")
    if not slash:
        raise fault(f"{value!r} is not a grant", "write <namespace>/<service account> or <namespace>/*")
    label(namespace)
    if account != "*":
        label(account)
    return value


def _lease(value: float) -> float:
    if value and value < LEASE_S_MIN:
        raise fault(f"a lease of {value:g} s ends between two words of the controller", f"write 0 or at least {LEASE_S_MIN:g}")
    return value


Text = Annotated[str, Field(max_length=TEXT_CHARS_MAX)]
Label = Annotated[Text, AfterValidator(label)]
ResourceName = Annotated[str, Field(max_length=253), AfterValidator(_resource_name)]
Port = Annotated[int, Field(ge=1, le=65535)]
PortText = Annotated[str | int, AfterValidator(_port_text)]
Address = Annotated[Text, AfterValidator(_address)]
Cidr = Annotated[Text, AfterValidator(_cidr)]
Endpoint = Annotated[Text, AfterValidator(_endpoint)]
Pattern = Annotated[Text, AfterValidator(_pattern)]
Principal = Annotated[Text, AfterValidator(_principal)]
PathPattern = Annotated[Text, AfterValidator(_path_pattern)]
HostPattern = Annotated[Text, AfterValidator(_host_pattern)]
Method = Annotated[Text, AfterValidator(_method)]
HeaderName = Annotated[Text, AfterValidator(_header_name)]
Grant = Annotated[Text, AfterValidator(_grant)]
Labels = Annotated[dict[Text, Text], Field(max_length=LABELS_MAX)]
Decision = Literal["ALLOW", "DENY"]
ExpressMode = Literal["auto", "off"]  # whether the kernel may carry HTTP by itself
TrustDomain = Annotated[Text, AfterValidator(_trust_domain)]
Principals = Annotated[list[Principal], Field(max_length=PRINCIPALS_MAX)]
LeaseSeconds = Annotated[float, Field(ge=0, le=LEASE_S_MAX, allow_inf_nan=False), AfterValidator(_lease)]  # 0: no limit


def regex(pattern: str) -> None:
    """A validation error for a pattern that may not be matched against paths."""
    try:
        check_regex(pattern)
    except ValueError as error:
        raise fault(str(error), "use Exact or PathPrefix, or a simpler pattern") from error


def seconds(low: float, high: float) -> Any:
    """A duration's bounds."""
    return Field(ge=low, le=high, allow_inf_nan=False)
