"""Answers "hello" on the listener that the service manager hands over (descriptor 3), and on each connection closes."""

import socket

listener = socket.socket(fileno=3)
while True:
    connection, _ = listener.accept()
    try:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n")
    except OSError:
        pass
    connection.close()
