"""The namespace lab: nodes, workloads and the mesh's own processes on one kernel, the host untouched."""

from lab.lab import Lab
from lab.members import Node, Workload
from lab.state import LabError

__all__ = ["Lab", "LabError", "Node", "Workload"]
