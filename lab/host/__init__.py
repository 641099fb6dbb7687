"""A host without a virtual machine: systemd in namespaces of its own, on this kernel and an overlay of this machine's root.
What a unit, an install or a restart does is seen here in seconds; a reboot and other kernels are for lab/vm."""

from lab.host.container import Container

__all__ = ["Container"]
