"""The per-node proxy: parses untrusted bytes, decides by mesh.policy and mesh.routing, and has no privilege of its own."""
