"""``python -m nodeagent.express_count``: where this kernel's FIONREAD knows nothing of redirected bytes, compile and verify
bpf/express_count.c, which tells it, attach it and pin the link; exit. One for each agent of a kernel: it looks at the sockets
of its own node alone."""

from __future__ import annotations

import re
from pathlib import Path

from nodeagent import btf
from nodeagent.loader import attach, child

FILES = ("types.h", "maps.h", "express_count.c")
NAMES = ("kretfunc__tcp_ioctl", "kretfunc__vmlinux__tcp_ioctl")  # BCC attaches by the name: before 0.27, from it on
PINNED = Path("express") / "count"


def names(version: str) -> tuple[str, ...]:
    """Those to try, by BCC's version, both if it does not tell: 0.31 ends the process at the one of before. Pure."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return NAMES[int(numbers >= (0, 27)) :][:1] if numbers else NAMES


def load(bpf_dir: Path, folder: Path, _layouts: Path) -> None:
    """Raises what BCC raises, LoadError and NoTypes; nothing is attached then."""
    flags = [f"-D{name}={value:#x}" for name, value in btf.offsets(btf.WANTED | btf.WANTED_TO_COUNT).items()]
    text, failures = child.join(folder, bpf_dir / "maps", FILES), []
    import bcc  # here, so that nothing but a load pays for LLVM

    for name in names(getattr(bcc, "__version__", "")):
        try:
            with child.compiled(text, [*flags, f"-DTELL={name}"]) as module:
                attach.pin(module.kfunc_exit_fds[name.encode()], bpf_dir / PINNED)
                return
        except Exception as error:  # BCC raises bare Exception
            failures.append(str(error))
    raise attach.LoadError("; ".join(failures))


if __name__ == "__main__":
    raise SystemExit(child.main("nodeagent.express_count", __doc__, load, "express_count"))
