"""`python -m lab.demo [--keep]`: brings the shop up, shows what the mesh does, and exits 0 only if each thing was seen.
With --hosts it shows the same of a shop that deploy/shop.sh put on hosts."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from lab import Lab, LabError
from lab.demo.inlab import LabShop
from lab.demo.onhosts import HostShop
from lab.demo.report import Report, Shown
from lab.demo.scenes import SCENES
from lab.demo.shop import NotSeen, Shop

NAME = "demo"
DISTRIBUTION = "/usr/lib/python3/dist-packages"
NEXT = """
The shop is left up. Try:
  .venv/bin/pillion status
  .venv/bin/pillion lab exec client -- curl -s http://front.shop.mesh/catalog/items
  .venv/bin/pillion policy why shop/intruder shop/catalog GET /admin
  .venv/bin/pillion flows -f
  .venv/bin/pillion get all -n shop
  .venv/bin/pillion run --service client --namespace shop --node n1 -- curl -s http://catalog.shop.mesh/items
and when done:
  .venv/bin/pillion lab down
"""
GONE = "\nThe shop is gone, nothing of it is left. To look around in it: make demo KEEP=1"


def show(report: Report, title: str, scene: Callable[[], str]) -> bool:
    """Runs one scene; whatever goes wrong in it is its own observation."""
    began = time.monotonic()
    try:
        with report.working(title):
            ok, observed = True, scene()
    except NotSeen as error:
        ok, observed = False, str(error)
    except (LabError, OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        ok, observed = False, f"{type(error).__name__}: {error}"
    report.add(Shown(title, ok, " ".join(observed.split()), time.monotonic() - began))
    return ok


def wanted(title: str, only: list[str]) -> bool:
    return not only or any(part in title for part in only)


def run(report: Report, lab: Lab, only: list[str]) -> bool:
    """Up, every scene, table. True if all was seen."""
    report.title("A shop on two nodes: nginx, a Python service in two versions, redis, mariadb, a client, an intruder")
    lab.down()
    shop = LabShop(lab)

    def bring_up() -> str:
        began = time.monotonic()
        lab.up(2)
        up = time.monotonic() - began
        shop.open(report.say)
        return f"mesh ready after {up:.1f} s, shop open after {time.monotonic() - began:.1f} s"

    ready = show(report, "up", bring_up)
    for title, scene in SCENES.items():
        if not wanted(title, only):
            continue
        if not lab.is_up:
            report.add(Shown(title, False, "not tried: the lab did not come up", 0.0))
            continue
        show(report, title, partial(scene, shop))
    return report.table() and ready


def run_on_hosts(report: Report, shop: Shop, only: list[str]) -> bool:
    report.title(f"The shop on hosts: what {shop.near} sees of it, with {shop.far}")
    for title, scene in SCENES.items():
        if wanted(title, only):
            show(report, title, partial(scene, shop))
    return report.table()


def hosts(text: str) -> dict[str, str]:
    found = dict(each.split("=", 1) for each in text.split(",") if "=" in each)
    if len(found) != 2 or text.count(",") != 1:
        raise argparse.ArgumentTypeError("two hosts: NODE=ADDRESS,NODE=ADDRESS")
    return found


def _stop(_number: int, _frame: object) -> None:
    """SIGTERM ends the demo as Ctrl-C does: with its lab taken down."""
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.demo", description="a small shop on two nodes; shows what a mesh does")
    parser.add_argument("--keep", action="store_true", help="leave the shop up")
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="only scenes whose title has these words")
    parser.add_argument("--name", default=NAME, help=f"of the lab (default: {NAME})")
    two = "show it of deploy/shop.sh's services instead: this host, which has the client, and the other"
    parser.add_argument("--hosts", type=hosts, metavar="NODE=ADDRESS,NODE=ADDRESS", help=two)
    options = parser.parse_args(arguments)
    report = Report()
    if options.hosts:
        sys.path.append(DISTRIBUTION)  # of scapy, which is not of the mesh's own environment
        return 0 if run_on_hosts(report, HostShop(options.hosts), options.only) else 1
    lab = Lab(options.name, report.say)
    seen = False
    signal.signal(signal.SIGTERM, _stop)
    try:
        seen = run(report, lab, options.only)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        options.keep = False
    finally:
        if not options.keep:
            lab.down()
    print(NEXT if options.keep else GONE)
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
