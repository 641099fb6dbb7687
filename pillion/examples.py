"""What the help of each command ends with: how it is used. Tests parse every line."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": ("pillion lab up", "pillion apply -f shop.yaml --wait", "pillion status"),
    "apply": (
        "pillion apply -f shop.yaml --wait",
        "pillion apply -f services/ -f policies.yaml",
        "pillion apply -f shop.yaml --dry-run",
    ),
    "get": ("pillion get services -n shop", "pillion get policy web -n shop -o yaml", "pillion get all"),
    "delete": ("pillion delete svc web -n shop", "pillion delete -f shop.yaml"),
    "wait": ("pillion wait 0", "pillion wait 42 --timeout 5"),
    "status": ("pillion status", "pillion --controller https://10.77.0.2:15443 status -o json"),
    "check": ("pillion check --pre", "pillion check", "pillion check --security --node n1"),
    "flows": ("pillion flows -f", "pillion flows --verdict denied --limit 20", "pillion flows --node n1 -o json"),
    "top": ("pillion top -f", "pillion top --node n1 -o json"),
    "run": ("pillion run --service web --namespace shop --port 8080 -- python3 -m http.server 8080",),
    "enrol": (
        "pillion enrol web.service --as shop/web --port 8080",
        "pillion enrol api --as api --label version=v2 --no-restart",
    ),
    "withdraw": ("pillion withdraw web.service", "pillion withdraw --all"),
    "completion": ("source <(pillion completion bash)", "pillion completion zsh"),
    "lab": ("pillion lab up --nodes 2", "pillion lab exec client -- curl -s http://front.shop.mesh/", "pillion lab down"),
    "node list": ("pillion node list",),
    "node token": ("pillion node token n3 --ttl 60", "pillion node token n3 --readmit"),
    "node cut": ("pillion node cut n3",),
    "identity list": ("pillion identity list -o json",),
    "identity show": ("pillion identity show shop/web",),
    "identity revoke": ("pillion identity revoke 38c6ac1a4b0d21b0a0eb6c7123c0b89528040cd3 --wait",),
    "operator add": ("pillion operator add ann --out ~/.pillion",),
    "operator list": ("pillion operator list",),
    "operator remove": ("pillion operator remove ann",),
    "policy why": (
        "pillion policy why shop/client shop/web GET /admin",
        "pillion policy why unknown redis.shop.mesh",
        "pillion policy why spiffe://mesh.local/ns/shop/sa/client shop/web GET /",
        "pillion policy why shop/client shop/web GET / --header 'x-user: ann' --port 8080",
    ),
    "express status": ("pillion express status", "pillion express status --node n1 -o json"),
    "express on": ("pillion express on", "pillion express on --service shop/web"),
    "express off": ("pillion express off", "pillion express off --service shop/web", "pillion express off --workload shop/web-1"),
    "express top": ("pillion express top --node n1",),
}


def epilog(command: str) -> str:
    """For a command's ``epilog``: each line is a paragraph, or they would run together."""
    lines = EXAMPLES[command]
    return "\n\n".join([f"Example{'s' if len(lines) > 1 else ''}:", *(f"  {line}" for line in lines)])
