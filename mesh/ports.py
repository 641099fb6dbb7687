"""The mesh's own ports. The programs have a node's from bpf/types.h; a test compares."""

from __future__ import annotations

OUTBOUND_PORT = 15001  # captured connections: on loopback in each workload's namespace
HBONE_PORT = 15008  # tunnels between nodes: on each workload's address
DNS_PORT = 15053  # the mesh's resolver: on loopback in each workload's namespace
CONTROLLER_PORT = 15443
RESERVED_PORTS = (OUTBOUND_PORT, HBONE_PORT, DNS_PORT)  # wherever workloads are: no service may have them, no name opens them
