"""Other systems than this machine's, unpacked in folders of the VM lab's cache for lab/host."""

from __future__ import annotations

import base64
import shutil
import sys
import tempfile
from pathlib import Path

from lab.vm.disk import PACKAGES, debootstrap, settle
from lab.vm.kernels import UBUNTU_SOURCES, locked

# Beside what any server has, what deploy/shop.sh would fetch: these hosts reach each other and nothing else
MORE = ["mariadb-server", "mariadb-client", "python3-scapy"]
SUITES = ("bookworm", "trixie", "noble")
UBUNTU = "http://archive.ubuntu.com/ubuntu", "/usr/share/debootstrap/scripts/gutsy"  # each of its releases goes by this script


def key_of(sources: str) -> bytes:
    """The key that a deb822 file has within. Pure."""
    lines = [line.strip() for line in sources.partition("BEGIN PGP PUBLIC KEY BLOCK-----")[2].splitlines()]
    body = lines[lines.index(".") + 1 :]
    return base64.b64decode("".join(body[: next(i for i, line in enumerate(body) if line.startswith("="))]))


def root_of(suite: str) -> Path:
    """Made by debootstrap, once for each list of packages: some minutes."""
    packages, options, mirror = [*PACKAGES, *MORE], list[str](), tuple[str, ...]()
    with locked("roots") as folder:
        place, stamp = folder / suite, folder / f"{suite}.packages"
        if suite == "noble":
            packages.append("systemd-resolved")
            key = folder / "ubuntu.gpg"
            key.write_bytes(key_of(UBUNTU_SOURCES.read_text()))
            options = [f"--keyring={key}", "--components=main,universe"]
            mirror = UBUNTU
        wanted = "\n".join([suite, *options, *packages])
        if stamp.exists() and stamp.read_text() == wanted:
            return place
        print(f"unpacking {suite} (some minutes, once)", file=sys.stderr, flush=True)
        shutil.rmtree(place, ignore_errors=True)
        stamp.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            root = Path(scratch) / "root"
            debootstrap(root, Path(scratch) / "log", suite, packages, options, mirror)
            settle(root)
            root.rename(place)
        stamp.write_text(wanted)
        return place
