"""Configurations for Envoy, the peer: one worker, the same features as the Pillion row beside it."""

from __future__ import annotations

import datetime
import ipaddress
import json
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Json = dict[str, Any]
_TYPE = "type.googleapis.com/envoy"


def make_certificate(directory: Path) -> None:
    """One key pair that both Envoys use as certificate and as trust root: `cert.pem`, `key.pem`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("bench")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def _address(host: str, port: int) -> Json:
    ipaddress.ip_address(host)
    return {"socket_address": {"address": host, "port_value": port}}


def _tls(directory: Path, side: str) -> Json:
    common: Json = {
        "tls_certificates": [
            {
                "certificate_chain": {"filename": str(directory / "cert.pem")},
                "private_key": {"filename": str(directory / "key.pem")},
            }
        ],
        "validation_context": {"trusted_ca": {"filename": str(directory / "cert.pem")}},
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
    }
    context: Json = {"common_tls_context": common, "@type": f"{_TYPE}.extensions.transport_sockets.tls.v3.{side}TlsContext"}
    if side == "Downstream":
        context["require_client_certificate"] = True
    else:
        context["sni"] = "bench"
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def http_filter(cluster: str, codec: str = "AUTO") -> Json:
    """Router behind an RBAC filter that allows GET and POST below /, as the Pillion row's policy does."""
    rbac: Json = {
        "@type": f"{_TYPE}.extensions.filters.http.rbac.v3.RBAC",
        "rules": {
            "action": "ALLOW",
            "policies": {
                "web": {
                    "permissions": [
                        {
                            "and_rules": {
                                "rules": [
                                    {"header": {"name": ":method", "string_match": {"safe_regex": {"regex": "GET|POST"}}}},
                                    {"url_path": {"path": {"prefix": "/"}}},
                                ]
                            }
                        }
                    ],
                    "principals": [{"any": True}],
                }
            },
        },
    }
    manager: Json = {
        "@type": f"{_TYPE}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "http",
        "codec_type": codec,
        "generate_request_id": False,
        "route_config": {
            "virtual_hosts": [
                {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster}}]}
            ]
        },
        "http_filters": [
            {"name": "envoy.filters.http.rbac", "typed_config": rbac},
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{_TYPE}.extensions.filters.http.router.v3.Router"}},
        ],
    }
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}


def tcp_filter(cluster: str) -> Json:
    return {
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": f"{_TYPE}.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "tcp",
            "cluster": cluster,
        },
    }


def listener(name: str, host: str, port: int, network_filter: Json, tls: Path | None = None) -> Json:
    chain: Json = {"filters": [network_filter]}
    if tls:
        chain["transport_socket"] = _tls(tls, "Downstream")
    return {"name": name, "address": _address(host, port), "filter_chains": [chain]}


def cluster(name: str, host: str, port: int, tls: Path | None = None, http2: bool = False) -> Json:
    out: Json = {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [{"max_connections": 10000, "max_requests": 10000, "max_pending_requests": 10000}]},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(host, port)}}]}],
        },
    }
    if tls:
        out["transport_socket"] = _tls(tls, "Upstream")
    if http2:
        out["typed_extension_protocol_options"] = {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPE}.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        }
    return out


def write_config(path: Path, listeners: list[Json], clusters: list[Json]) -> Path:
    path.write_text(json.dumps({"static_resources": {"listeners": listeners, "clusters": clusters}}, indent=1))
    return path
