"""``python -m tests.deploy.provision [--suite trixie]… [--write docs/hosts.md]``: how the Vagrant lab's machines are made,
each line as the Vagrantfile has it, on hosts of lab/host in their place, with the addresses that they have there; then that
a second install changes nothing, that the kernel carries requests there, and that `--remove` leaves nothing.

Each system is unpacked by debootstrap with all its packages, since these hosts reach each other and nothing else. Wheels are
downloaded for each one's Python, by the lock's hashes."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lab import netns
from lab.host import Container
from lab.pace import SLOW
from lab.state import LabError
from lab.vm.kernels import tool
from tests.deploy import roots

PROJECT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- provisioning: made by python -m tests.deploy.provision -->", "<!-- provisioning: end -->"
SWITCH = "pl-provision"
LINE_S = 900.0 * SLOW
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64", "manylinux_2_34_x86_64")
SEEN = "/vagrant/tests/deploy/programs/after.sh"
# When all machines are made: (machine, line) -> what it must say
AFTER = {
    ("controller", "/vagrant/deploy/install.sh controller"): "nothing to do",
    ("n1", "/vagrant/deploy/install.sh node"): "nothing to do",
    ("n2", f"{SEEN} carried"): "express: on",
    ("n1", "/vagrant/deploy/install.sh node --remove"): "removed /opt/pillion",
    ("n1", f"{SEEN} left"): "nothing is left",
    ("controller", "/vagrant/deploy/install.sh controller --remove"): "removed /opt/pillion",
    ("controller", f"{SEEN} left"): "nothing is left",
}
# Answers whatever a Vagrantfile says, and keeps what it says about addresses and shells
READER = """
require "json"
SEEN = Hash.new { |all, name| all[name] = {"lines" => []} }
class Said
  def initialize(name) = @name = name
  def vm = self
  def define(name, **) = yield(Said.new(name))
  def box=(name); SEEN[@name]["box"] = name; end
  def network(_, **options) = SEEN[@name]["address"] = options[:ip]
  def provision(_, **options) = SEEN[@name]["lines"] << options[:inline]
  def method_missing(*) = self
end
module Vagrant; def self.configure(_) = yield(Said.new("all")); end
load ARGV[0]
puts JSON.generate(SEEN)
"""


def machines() -> dict[str, dict[str, Any]]:
    """Of the Vagrantfile: name -> its box, address and lines, in order."""
    return dict(json.loads(tool("ruby", "-e", READER, str(PROJECT / "Vagrantfile"))))


def wheels(folder: Path, python: str) -> None:
    """All that install.sh takes from an index, for this Python; by hash."""
    platforms = [word for each in PLATFORMS for word in ("--platform", each)]
    download = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "-d", str(folder)]
    pip = [*download, "--only-binary", ":all:", "--python-version", python, *platforms]
    for lock in ("requirements.lock", "build.lock"):
        tool(*pip, "--require-hashes", "-r", str(PROJECT / "deploy" / lock), timeout_s=600)


def system_of(root: Path) -> tuple[str, str]:
    """Its name, such as Debian 13, and its Python's version."""
    script = ". /etc/os-release; echo $NAME $VERSION_ID; /usr/bin/python3 -V"
    name, python = tool("chroot", str(root), "sh", "-c", script).splitlines()
    return name.replace(" GNU/Linux", ""), python.removeprefix("Python ").rpartition(".")[0]


def run(root: Path) -> dict[tuple[str, str], str]:
    """(machine, line) -> the last it said. Raises LabError with what one said that failed."""
    found, (system, python) = {}, system_of(root)
    with ExitStack() as stack:
        house = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        wheels(house, python)
        netns.delete(SWITCH)  # of a run that was killed; its hosts take the place of their former ones, too
        netns.add(SWITCH, {})
        stack.callback(netns.delete, SWITCH)
        netns.batch(SWITCH, ["link add lan type bridge", "link set lan up"])
        hosts: dict[str, Container] = {}

        def say(name: str, line: str) -> str:
            """The last it says."""
            print(f"{system}, {name}: {line}", flush=True)
            env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/srv/wheels"}
            said = hosts[name].run(["bash", "-l", "-c", line], timeout=LINE_S, env=env)
            print(said.stdout + said.stderr, flush=True)
            if said.returncode:
                raise LabError(f"{line} on {name}: exit code {said.returncode}", (said.stdout + said.stderr)[-2000:])
            found[name, line] = said.stdout.strip().splitlines()[-1]
            return found[name, line]

        for name, machine in machines().items():
            host = stack.enter_context(Container(f"{name}prov", print, {"/vagrant": PROJECT, "/srv/wheels": house}, root))
            host.plug(SWITCH, name, f"{machine['address']}/24")
            netns.batch(SWITCH, [f"link set {name} master lan", f"link set {name} up"])
            hosts[name] = host
            for line in machine["lines"]:
                say(name, line)
        for (name, line), wanted in AFTER.items():
            if wanted not in say(name, line):
                raise LabError(f"{line} on {name} says {found[name, line]}", f"it should say {wanted}")
    return found


def row(machine: str, line: str) -> str:
    """How a row of the table begins. Pure."""
    return f"| {machine} | `{escaped(line)}` |"


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def table(found: dict[str, dict[tuple[str, str], str]]) -> str:
    """By system what each line said last. Pure."""
    lines = [f"| machine | line | {' | '.join(found)} |", "|---" * (len(found) + 2) + "|"]
    for machine, line in next(iter(found.values())):
        lines.append(row(machine, line) + "".join(f" {escaped(each[machine, line])} |" for each in found.values()))
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.deploy.provision", description=__doc__)
    parser.add_argument("--suite", choices=roots.SUITES, action="append", help="may repeat (default: all of them)")
    parser.add_argument("--write", type=Path, help="the document whose table is replaced")
    options = parser.parse_args()
    systems = [roots.root_of(suite) for suite in options.suite or roots.SUITES]
    text = table({system_of(root)[0]: run(root) for root in systems})
    print(text)
    if options.write:
        before, _, rest = options.write.read_text().partition(f"{BEGIN}\n")
        options.write.write_text(f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
