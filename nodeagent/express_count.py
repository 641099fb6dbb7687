"""``python -m nodeagent.express_count``: where this kernel's FIONREAD knows nothing of redirected bytes, compile and verify
bpf/express_count.c, which tells it, attach it and pin the link; exit. One for each agent of a kernel: it looks at the sockets
of its own node alone."""

from __future__ import annotations

from pathlib import Path

from nodeagent import btf
from nodeagent.loader import attach, child

FILES = ("types.h", "maps.h", "express_count.c")
NAMES = ("kretfunc__tcp_ioctl", "kretfunc__vmlinux__tcp_ioctl")  # BCC attaches by the name: before 0.27, from it on
PINNED = Path("express") / "count"


def load(bpf_dir: Path, folder: Path, _layouts: Path) -> None:
    """Raises what BCC raises, LoadError and NoTypes; nothing is attached then."""
    flags = [f"-D{name}={value:#x}" for name, value in btf.offsets(btf.WANTED | btf.WANTED_TO_COUNT).items()]
    text, failures = child.join(folder, bpf_dir / "maps", FILES), []
    for name in NAMES:
        try:
            with child.compiled(text, [*flags, f"-DTELL={name}"]) as module:
                attach.pin(module.kfunc_exit_fds[name.encode()], bpf_dir / PINNED)
                return
        except Exception as error:  # BCC raises bare Exception
            failures.append(str(error))
    raise attach.LoadError("; ".join(failures))


if __name__ == "__main__":
    raise SystemExit(child.main("nodeagent.express_count", __doc__, load, "express_count"))
