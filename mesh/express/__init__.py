"""Requests decided by a table: HTTP/1.1 heads, routes and policies as one finite automaton that the kernel can step."""
