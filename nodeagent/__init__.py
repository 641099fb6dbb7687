"""The node's agent: knows its workloads, keeps the kernel's maps and the proxy's sockets as the controller's state asks."""
