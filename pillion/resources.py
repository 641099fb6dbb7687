"""apply, get, delete, wait: resources at the controller."""

from __future__ import annotations

import difflib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer

from mesh.resources import KINDS, ResourceErrors, load
from pillion import output
from pillion.client import Client, Refused
from pillion.context import FormatOption, NamespaceOption, chosen
from pillion.errors import USAGE, CliError
from pillion.output import Format
from pillion.together import Together

FILE_BYTES_MAX = 4 << 20
FILENAME_CHARS_MAX = 256
SHORT = {
    "svc": "Service",
    "wl": "Workload",
    "grant": "NodeGrant",
    "route": "HTTPRoute",
    "policy": "AuthorizationPolicy",
    "authz": "AuthorizationPolicy",
    "peerauth": "PeerAuthentication",
    "config": "MeshConfig",
}


def kind_of(text: str) -> str:
    """A kind by its name, in any case, plural or short."""
    wanted = text.lower()
    if wanted in SHORT:
        return SHORT[wanted]
    for kind in KINDS:
        if wanted in (kind.lower(), f"{kind.lower()}s", f"{kind.lower().removesuffix('y')}ies"):
            return kind
    near = difflib.get_close_matches(wanted, [*SHORT, *(kind.lower() for kind in KINDS)], 1)
    meant = f"did you mean {kind_of(near[0])}? " if near else ""
    raise CliError(f"{text!r} is no kind of resource", f"{meant}use one of: {', '.join(KINDS)}", USAGE)


def _complete_kind(incomplete: str) -> list[str]:
    return [kind for kind in sorted(KINDS) if kind.lower().startswith(incomplete.lower())]


def _read(name: str) -> str:
    try:
        if name == "-":
            text = sys.stdin.read(FILE_BYTES_MAX + 1)
        else:
            with Path(name).open(encoding="utf-8") as file:
                text = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise CliError(f"{name}: {error.strerror}", "name a readable YAML or JSON file, or - for standard input") from error
    except UnicodeDecodeError as error:
        raise CliError(f"{name}: is no UTF-8 text", "name a YAML or JSON file") from error
    if len(text) > FILE_BYTES_MAX:
        raise CliError(f"{name}: over {FILE_BYTES_MAX} bytes", "split it")
    return text


def _files(names: list[str]) -> list[str]:
    """Folders stand for the YAML and JSON files in them."""
    out: list[str] = []
    for name in names:
        path = Path(name)
        if name != "-" and path.is_dir():
            out += [str(file) for file in sorted(path.iterdir()) if file.suffix in (".yaml", ".yml", ".json")]
        else:
            out.append(name)
    return out


def _show_errors(errors: list[dict[str, Any]], form: Format = Format.TABLE) -> None:
    if form is not Format.TABLE:
        output.machine({"errors": errors}, form)
        return
    for values in errors:
        where = f"{values.get('file', '')}:{values['line']}" if values.get("line") else values.get("file", "")
        field = f"{values['field']}: " if values.get("field") else ""
        print(f"error: {output.printable(where)}: {output.printable(field + str(values.get('message', '')))}", file=sys.stderr)
        print(f"  {output.printable(values.get('remedy', ''))}", file=sys.stderr)


def apply(
    file: Annotated[list[str], typer.Option("-f", "--file", help="a file, a folder, or - for standard input; may repeat")],
    wait: Annotated[bool, typer.Option("--wait", help="until every node has it in force")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it would do, or what is wrong, and do nothing")] = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """Create or change resources: all of them, or none if one is wrong."""
    if wait and dry_run:
        raise CliError("--wait and --dry-run exclude each other", "leave one out: a dry run puts nothing in force", USAGE)
    texts = {"<stdin>" if name == "-" else name: _read(name) for name in _files(file)}
    if not texts:
        raise CliError("there is no file to apply", "name one that ends in .yaml, .yml or .json", USAGE)
    together = Together(texts)
    if errors := together.errors():
        _show_errors(errors, form)
        raise typer.Exit(1)
    client = chosen.controller_client()
    try:
        answer = apply_text(client, together.text, ", ".join(texts), dry_run)
    except Refused as error:
        if dry_run and error.status == 404:
            what = "this controller knows of no dry run; nothing was changed"
            raise CliError(what, "upgrade the controller, or apply without --dry-run") from error
        if isinstance(error.body, dict) and error.body.get("errors"):
            _show_errors([together.placed(each) for each in error.body["errors"]], form)
            raise typer.Exit(1) from error
        raise
    where = f" {wait_for(client, answer['revision'], 30.0)}" if wait else ""
    if form is not Format.TABLE:
        output.machine(answer, form)
        return
    for result in answer["results"]:
        name = "/".join(part for part in (result["namespace"], result["name"]) if part)
        would = "would be " if dry_run and result["result"] != "unchanged" else ""
        print(f"{result['kind']} {name} {would}{result['result']}")
    print(f"nothing was changed, revision {answer['revision']}" if dry_run else f"revision {answer['revision']}{where}")


def apply_text(client: Client, text: str, filename: str, dry_run: bool = False) -> dict[str, Any]:
    """``revision`` and ``results``; the file name is for messages. A dry run is asked for by its own path, so that a
    controller which knows of none refuses it."""
    query = urlencode({"filename": filename[:FILENAME_CHARS_MAX]})
    answer: dict[str, Any] = client.call("POST", f"/v1/apply{'/dry-run' if dry_run else ''}?{query}", text)
    return {"dry_run": True, **answer} if dry_run else answer


def fetch(client: Client, kind: str | None, namespace: str | None, name: str | None) -> list[dict[str, Any]]:
    given = {"kind": kind, "namespace": namespace, "name": name}
    query = urlencode({key: value for key, value in given.items() if value})
    items: list[dict[str, Any]] = client.get(f"/v1/resources?{query}")["items"]
    return items


def get(
    kind: Annotated[
        str, typer.Argument(help="a kind, or short (svc, route, policy, grant …), or all", autocompletion=_complete_kind)
    ],
    name: Annotated[str | None, typer.Argument(help="of one (default: every one of the kind)")] = None,
    namespace: NamespaceOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Show resources."""
    wanted = None if kind.lower() == "all" else kind_of(kind)
    items = fetch(chosen.controller_client(), wanted, namespace, name)
    if name is not None and not items:
        where = f" in namespace {namespace}" if namespace else ""
        raise CliError(f"there is no {wanted or 'resource'} {name!r}{where}", f"see what there is: pillion get {wanted or 'all'}")
    if form is not Format.TABLE:
        output.machine(items[0] if name is not None and len(items) == 1 else items, form)
        return
    if not items:
        print(f"no {wanted or 'resources'} here", file=sys.stderr)
        return
    rows = [
        (item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"], summary(item["kind"], item.get("spec", {})))
        for item in items
    ]
    output.table(("KIND", "NAMESPACE", "NAME", "SPEC"), rows)


def summary(kind: str, spec: dict[str, Any]) -> str:
    """A resource in a line."""
    if kind == "Service":
        ports = ", ".join(f"{port['port']}→{port.get('targetPort', port['port'])}{_protocol(port)}" for port in spec["ports"])
        return f"{ports}; {_labels(spec['selector'])}{_accounts(spec)}{_express(spec)}"
    if kind == "Workload":
        return f"{spec['serviceAccount']} on {spec['node']}: {' '.join(spec['addresses'])}{_express(spec)}"
    if kind == "NodeGrant":
        return f"{spec['node']} may run {', '.join(spec['serviceAccounts'])}"
    if kind == "HTTPRoute":
        parents = ", ".join(parent["name"] for parent in spec["parentRefs"])
        return f"of {parents}: {_rules(spec)}"
    if kind == "AuthorizationPolicy":
        selector = _labels((spec.get("selector") or {}).get("matchLabels", {}))
        target = ", ".join(ref["name"] for ref in spec.get("targetRefs") or []) or selector or "all of the namespace"
        dry = " (audit mode)" if spec.get("mode") == "audit" else ""
        return f"{spec.get('action', 'ALLOW')}{dry} to {target}: {_rules(spec)}"
    if kind == "PeerAuthentication":
        return str(spec["mtls"]["mode"])
    return ", ".join(f"{key}={value}" for key, value in spec.items())


def _rules(spec: dict[str, Any]) -> str:
    count = len(spec.get("rules") or [])
    return f"{count} rule{'' if count == 1 else 's'}"


def _protocol(port: dict[str, Any]) -> str:
    return f" {port['appProtocol']}" if port.get("appProtocol") else "/udp" if port.get("protocol") == "UDP" else ""


def _accounts(spec: dict[str, Any]) -> str:
    return f" of {', '.join(spec['serviceAccounts'])}" if spec.get("serviceAccounts") else ""


def _express(spec: dict[str, Any]) -> str:
    return "; express off" if spec.get("express") == "off" else ""


def _labels(labels: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def delete(
    kind: Annotated[str | None, typer.Argument(help="a kind; without --file", autocompletion=_complete_kind)] = None,
    name: Annotated[str | None, typer.Argument(help="of the one that is meant")] = None,
    namespace: Annotated[
        str | None, typer.Option("-n", "--namespace", help="of the resource (default: default); a file says its own")
    ] = None,
    file: Annotated[list[str] | None, typer.Option("-f", "--file", help="delete what these files name")] = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Delete a resource, or those a file names, as far as they are there."""
    wanted: list[tuple[str, str, str]] = []
    if kind and name and not file:
        real = kind_of(kind)
        wanted.append((real, "" if KINDS[real].cluster_wide else namespace or "default", name))
    elif file and not kind:
        for each in _files(file):
            try:
                wanted += [resource.key for resource in reversed(load(_read(each), each))]
            except ResourceErrors as error:
                _show_errors([asdict(fault) for fault in error.errors], form)
                raise typer.Exit(1) from error
    else:
        raise CliError("what shall be deleted?", "pillion delete KIND NAME [-n NAMESPACE], or: pillion delete -f FILE", USAGE)
    client, revision, deleted = chosen.controller_client(), 0, []
    for key in wanted:
        path = "/".join(quote(part or "-", safe="") for part in key)
        try:
            revision = client.call("DELETE", f"/v1/resources/{path}")["revision"]
            deleted.append(key)
        except Refused as error:
            if error.status == 404 and not file and key[1] and namespace is None:
                where = f"is it in another namespace? -n NAMESPACE; see: pillion get {key[0]}"
                raise CliError(error.what, where) from error
            if error.status != 404 or not file:
                raise
        if form is Format.TABLE:
            print(f"{key[0]} {'/'.join(part for part in key[1:] if part)} {'deleted' if key in deleted else 'was not there'}")
    revision = revision or client.get("/v1/status")["revision"]
    if form is Format.TABLE:
        print(f"revision {revision}")
    else:
        output.machine({"revision": revision, "deleted": ["/".join(each) for each in deleted]}, form)


def wait_for(client: Client, revision: int, timeout_s: float) -> str:
    """Until every connected node has a revision in force; where that is, in words. Raises CliError past the time."""
    try:
        client.get(f"/v1/wait?revision={revision}&timeout={timeout_s:g}", timeout_s=timeout_s + 10.0)
    except Refused as error:
        if error.status == 504:
            body = error.body if isinstance(error.body, dict) else {}
            late = ", ".join(
                f"{each['name']} is at {each['acked']} {each['error']}".rstrip() for each in body.get("laggards", [])
            )
            raise CliError(
                f"revision {revision} is not in force everywhere after {timeout_s:g} s: {output.printable(late)}",
                "see why: pillion status",
            ) from error
        raise
    away = [node["name"] for node in client.get("/v1/status")["nodes"] if not node["connected"] and not node["cut"]]
    return f"in force on every connected node; away: {', '.join(away)}" if away else "in force everywhere"


def wait(
    revision: Annotated[int, typer.Argument(help="as printed by apply; 0: the newest", min=0)],
    timeout: Annotated[float, typer.Option(help="seconds", min=0.1, max=600.0)] = 30.0,
    form: FormatOption = Format.TABLE,
) -> None:
    """Wait until every connected node has a revision in force."""
    client = chosen.controller_client()
    wanted = revision or client.get("/v1/status")["revision"]
    where = wait_for(client, wanted, timeout)
    if form is not Format.TABLE:
        output.machine({"revision": wanted}, form)
        return
    print(f"revision {wanted} is {where}")
