"""operator: who may command the mesh from afar. A key is made here and stays here; the controller sees a request signed by it."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pillion import output
from pillion.context import FormatOption, chosen
from pillion.errors import CliError
from pillion.examples import epilog
from pillion.output import Format

app = typer.Typer(help="Operators: who may command the mesh from another machine.", no_args_is_help=True)


@app.command("add", epilog=epilog("operator add"))
def add(
    name: Annotated[str, typer.Argument(help="lower-case letters, digits, '-'")],
    out: Annotated[Path, typer.Option("--out", help="the folder for key and certificate", file_okay=False)] = Path(),
    form: FormatOption = Format.TABLE,
) -> None:
    """A certificate for an operator: writes NAME.key (0600), NAME.crt and ca.crt, prints what to export.

    It is good for 30 days, and until then for `pillion operator remove`. An operator may have several.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    paths = {what: out.expanduser() / what for what in (f"{name}.key", f"{name}.crt", "ca.crt")}
    key_path, certificate_path, roots_path = paths.values()
    if "/" in name or not name:
        raise CliError(f"{name!r} is no name", "use lower-case letters, digits and '-'")
    client = chosen.controller_client()
    _write_key(key_path, key)
    try:
        answer = client.call("POST", f"/v1/operators/{quote(name, safe='')}", {"csr": _request(key)})
        certificate_path.write_text(answer["chain"])
        roots_path.write_text(answer["bundle"])
    except BaseException as error:
        with contextlib.suppress(OSError):
            key_path.unlink()  # a key without a certificate is of no use
        if isinstance(error, OSError):
            raise CliError(f"{out}: {error.strerror}", "name a folder you may write to: --out") from error
        raise
    environment = {
        "PILLION_CONTROLLER": next(iter(answer["controller"]), ""),
        "PILLION_CERT": str(certificate_path.absolute()),
        "PILLION_KEY": str(key_path.absolute()),
        "PILLION_CA": str(roots_path.absolute()),
    }
    if form is not Format.TABLE:
        described = {"serial": answer["serial"], "not_after": answer["not_after"], "controllers": answer["controller"]}
        output.machine({"name": name, **described, "environment": environment}, form)
        return
    for variable, value in environment.items():
        print(f"export {variable}={shlex.quote(value)}")
    told = f"certificate {answer['serial']}, good for {output.until(answer['not_after'])}"
    print(f"operator {name}, {told}; export these, then: pillion status", file=sys.stderr)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise CliError(f"{path} is there already", "name another folder with --out, or take it away first") from error
    except OSError as error:
        raise CliError(f"{path}: {error.strerror}", "name a folder you may write to: --out") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)


def _request(key: ec.EllipticCurvePrivateKey) -> str:
    """Proves possession of the key; who it is for says the API."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


@app.command("list", epilog=epilog("operator list"))
def operators(form: FormatOption = Format.TABLE) -> None:
    """Operators and their certificates."""
    items: list[dict[str, Any]] = chosen.controller_client().get("/v1/operators")["items"]
    if form is not Format.TABLE:
        output.machine(items, form)
        return
    if not items:
        print("none: root on the controller's machine needs no certificate; others: pillion operator add NAME", file=sys.stderr)
        return
    rows = [(item["name"], item["serial"], output.until(item["not_after"]), item["revoked"]) for item in items]
    output.table(("OPERATOR", "CERTIFICATE", "FOR", "REVOKED"), rows)


@app.command("remove", epilog=epilog("operator remove"))
def remove(name: Annotated[str, typer.Argument(help="as operator list shows it")], form: FormatOption = Format.TABLE) -> None:
    """Revoke every certificate of an operator, at once."""
    answer = chosen.controller_client().call("DELETE", f"/v1/operators/{quote(name, safe='')}")
    if form is not Format.TABLE:
        output.machine({"name": name, "revision": answer["revision"]}, form)
        return
    print(f"operator {name} is out, revision {answer['revision']}")
