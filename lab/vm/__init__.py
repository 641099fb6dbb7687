"""The VM lab: machines with kernels of their own."""

from lab.vm.handle import VmHandle
from lab.vm.plan import Kind
from lab.vm.vms import VmLab

__all__ = ["Kind", "VmHandle", "VmLab"]
