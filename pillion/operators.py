"""operator: who may command the mesh from afar. A key is made here and stays here; the controller sees a request signed by it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mesh.identity import IdentityError, check_label
from pillion import output
from pillion.context import FormatOption, chosen
from pillion.errors import USAGE, CliError
from pillion.examples import epilog
from pillion.output import Format

app = typer.Typer(help="Operators: who may command the mesh from another machine.", no_args_is_help=True)


@app.command("add", epilog=epilog("operator add"))
def add(
    name: Annotated[str, typer.Argument(help="lower-case letters, digits, '-'")],
    out: Annotated[Path, typer.Option("--out", help="the folder for key and certificate", file_okay=False)] = Path(),
    replace_roots: Annotated[
        bool, typer.Option("--replace-roots", help="also where ca.crt holds other roots, as it does after they were rotated")
    ] = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """A certificate for an operator: writes NAME.key (0600), NAME.crt and ca.crt, prints what to export.

    It is good for 30 days, and until then for `pillion operator remove`. An operator may have several. No file that is
    there is written over, unless ca.crt with --replace-roots.
    """
    try:
        check_label(name, "operator")
    except IdentityError as error:
        raise CliError(str(error), "use lower-case letters, digits and '-', for example: ann", USAGE) from error
    key = ec.generate_private_key(ec.SECP256R1())
    key_path, certificate_path, roots_path = (out.expanduser() / what for what in (f"{name}.key", f"{name}.crt", "ca.crt"))
    client = chosen.controller_client()
    made: list[Path] = []
    answer: dict[str, Any] = {}
    try:
        for path, mode in ((key_path, 0o600), (certificate_path, 0o644)):
            _write_new(path, b"", mode)  # the places are ours before the controller is asked
            made.append(path)
        key_path.write_bytes(_pem(key))
        answer = client.call("POST", f"/v1/operators/{quote(name, safe='')}", {"csr": _request(key)})
        certificate_path.write_text(answer["chain"])
        _write_roots(roots_path, answer["bundle"].encode(), replace_roots)
    except BaseException as error:
        with contextlib.suppress(OSError, CliError):
            for path in made:
                path.unlink()  # one without the other is of no use
            if answer:
                client.call("POST", f"/v1/certificates/{quote(answer['serial'], safe='')}/revoke")
        if isinstance(error, OSError):
            raise CliError(f"{error.filename or out}: {error.strerror}", "name a folder you may write to: --out") from error
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


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Raises CliError if there is anything of this name: its owner may need it, and a link may lead anywhere."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except FileExistsError as error:
        raise CliError(f"{path} is there already", "name another folder with --out, or take it away first") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _write_roots(path: Path, bundle: bytes, replace: bool) -> None:
    """Raises CliError where other ones are there and are to stay, OSError."""
    if not os.path.lexists(path):
        _write_new(path, bundle, 0o644)
    elif path.read_bytes() != bundle:
        if not replace:
            what = f"{path} is there already, and holds other roots than this mesh's: another's, or its own before a rotation"
            raise CliError(what, "name another folder with --out; or, to write over it: --replace-roots")
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        _write_new(fresh, bundle, 0o644)
        fresh.replace(path)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


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
