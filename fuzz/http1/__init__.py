"""The HTTP/1.1 core against httptools (llhttp), h11 and nginx: what Pillion accepts must read the same everywhere."""
