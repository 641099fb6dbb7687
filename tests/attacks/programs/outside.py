"""A server outside the mesh, TCP. argv: PORT,PORT… ADDRESS…: answers each request with "outside at ADDRESS", once it was sent a
line; after "stay" it answers each further line too."""

import selectors
import socket
import sys


def main() -> None:
    selector = selectors.DefaultSelector()
    for port in sys.argv[1].split(","):
        for address in sys.argv[2:]:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            selector.register(socket.create_server((address, int(port)), family=family), selectors.EVENT_READ, "")
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            if not key.data:
                conn, _address = sock.accept()
                selector.register(conn, selectors.EVENT_READ, conn.getsockname()[0])
                continue
            try:
                data = sock.recv(4096)
                if data:
                    sock.sendall(f"outside at {key.data}\n".encode())
            except OSError:
                data = b""
            if not data.startswith(b"stay"):
                selector.unregister(sock)
                sock.close()


main()
