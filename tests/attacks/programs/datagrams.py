"""Prints the text of every datagram that arrives. argv: PORT."""

import socket
import sys

with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
    sock.bind(("::", int(sys.argv[1])))
    print("ready", flush=True)
    while True:
        print(sock.recv(4096).decode(errors="replace"), flush=True)
