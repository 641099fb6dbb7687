"""The shared language of Pillion: identities, resources, decisions. Pure: no I/O, imports nothing of ours."""
