"""What TLS makes of the pieces of a message: few records, few buffers, few copies."""

from __future__ import annotations

import ssl

CHUNK_BYTES = 64 << 10  # goes through TLS at once: its buffers keep the size of the largest; a piece this large is not copied


def seal(tls: ssl.SSLObject, outgoing: ssl.MemoryBIO, pieces: list[bytes | memoryview]) -> list[bytes]:
    """Small pieces share a record; a large one is not copied for that. ``outgoing``: where ``tls`` writes."""
    write, read = tls.write, outgoing.read
    sealed: list[bytes] = []
    small: list[bytes | memoryview] = []
    size = 0  # of them
    for piece in pieces:
        if len(piece) < CHUNK_BYTES:
            if size + len(piece) > CHUNK_BYTES:
                write(b"".join(small))
                sealed.append(read())
                small, size = [], 0
            small.append(piece)
            size += len(piece)
            continue
        if size:
            write(b"".join(small))
            small, size = [], 0
        view = memoryview(piece)
        for at in range(0, len(view), CHUNK_BYTES):
            write(view[at : at + CHUNK_BYTES])
            sealed.append(read())
    if size:
        write(b"".join(small))
        sealed.append(read())
    return sealed
