"""`python -m lab.vm up|run|copy|status|down`: what `pillion lab vm …` runs."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO, cast

from lab.cleanup import take_down
from lab.state import LabError
from lab.vm.plan import LIMIT_S, MEMORY_MIB, Kind
from lab.vm.qemu import accelerator
from lab.vm.vms import VmLab, checkout_of, known


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _up(options: argparse.Namespace) -> int:
    began = time.monotonic()
    lab = VmLab(options.name, _say)
    series = [each for each in options.kernels.split(",") if each]
    names = [f"k{each.replace('.', '-')}" if series.count(each) == 1 else f"m{place}" for place, each in enumerate(series, 1)]
    print(f"VM lab {lab.name}: kernels {', '.join(series)}, by {accelerator()}", file=sys.stderr)
    running = {name for name, vm in lab.vms.items() if vm.running}
    started = [
        lab.start(
            name,
            kernel,
            kind=Kind.MACHINE if options.machine else Kind.QUICK,
            cpus=options.cpus,
            memory_mib=options.memory_mib,
            limit_s=options.limit_s,
            outside=options.outside,
            wait=False,
        )
        for name, kernel in zip(names, series, strict=True)
        if name not in running
    ]
    for vm in started:
        peer = vm.ready()
        _say(f"{vm.name}: {peer.release}, {' '.join(vm.addresses)}")
    print(f"up after {time.monotonic() - began:.1f} s; it ends by itself after {options.limit_s} s", file=sys.stderr)
    print(f"next: pillion lab vm run {series[0]} -- uname -a; logs: {lab.folder}", file=sys.stderr)
    return 0


def _run(options: argparse.Namespace) -> int:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    given, out, err = (os.fdopen(fd, mode, buffering=0, closefd=False) for fd, mode in ((0, "rb"), (1, "wb"), (2, "wb")))
    source = None if sys.stdin.isatty() else cast(BinaryIO, given)
    vm = VmLab(options.name).vm(options.vm)
    cwd = options.cwd or (os.getcwd() if vm.kind == Kind.QUICK.value else "/root")
    argv = command or ["uname", "-a"]
    try:
        code = vm.stream(argv, input=source, timeout=options.timeout, stdout=out, stderr=err, cwd=cwd)
    except subprocess.TimeoutExpired:
        print(f"error: not done within {options.timeout:.0f} s; it was killed\n  give it more: --timeout", file=sys.stderr)
        return 124
    return code if code >= 0 else 128 - code


def _copy(options: argparse.Namespace) -> int:
    VmLab(options.name).vm(options.vm).copy_in(Path(options.source), options.target)
    return 0


def _status(options: argparse.Namespace) -> int:
    for name in [options.name] if options.name_given else known():
        for vm in VmLab(name).vms.values():
            state = "running" if vm.running else "ended"
            print(f"{name}  {vm.name}  {vm.release}  {vm.kind}  {' '.join(vm.addresses)}  {state}  {vm.console}")
    return 0


def _down(options: argparse.Namespace) -> int:
    names = known() if options.all or options.here else [options.name]
    take_down("VM lab", names, lambda name: VmLab(name).down(), "pillion lab vm down", checkout_of if options.here else None)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pillion lab vm", description="machines with kernels of their own, under QEMU")
    parser.set_defaults(name="vm", name_given=False)
    commands = parser.add_subparsers(required=True, metavar="up|run|copy|status|down")

    def command(name: str, function: object, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--name", default=None, help="which VM lab (default: vm)")
        sub.set_defaults(function=function)
        return sub

    up = command("up", _up, "boot a VM for each kernel")
    up.add_argument("--kernels", default="6.1,6.12", help="series of stock kernels, as 6.1 or ubuntu-6.8 (default: 6.1,6.12)")
    up.add_argument("--machine", action="store_true", help="systemd on a disk of its own, instead of this machine's root")
    up.add_argument("--cpus", type=int, default=min(2, os.cpu_count() or 1))
    up.add_argument("--memory-mib", type=int, default=MEMORY_MIB)
    up.add_argument("--limit-s", type=int, default=LIMIT_S, help="the VM is killed after so many seconds")
    up.add_argument("--outside", action="store_true", help="a second network card, to what this machine reaches")
    run = command("run", _run, "run a program in a VM, with its input, output and exit code")
    run.add_argument("--timeout", type=float, default=600.0, help="seconds")
    run.add_argument("--cwd", default=None)
    run.add_argument("vm", metavar="KERNEL|VM")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND …")
    copy = command("copy", _copy, "copy a file or a folder into a VM")
    copy.add_argument("source")
    copy.add_argument("vm", metavar="KERNEL|VM")
    copy.add_argument("target", help="a folder there")
    command("status", _status, "which VMs there are")
    down = command("down", _down, "end the VMs and remove their disks")
    which = down.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every VM lab of this machine")
    which.add_argument("--here", action="store_true", help="every VM lab of this checkout")
    options = parser.parse_args(arguments)
    options.name_given = options.name is not None
    options.name = options.name or "vm"
    try:
        return int(options.function(options))
    except LabError as error:
        print(f"error: {error.what}", file=sys.stderr)
        if error.remedy:
            print(f"  {error.remedy}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
