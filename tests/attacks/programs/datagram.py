"""Sends one datagram from any source address, its own or not (IP_TRANSPARENT). argv: SOURCE DESTINATION PORT TEXT. Prints the
error's name or PASSED."""

import socket
import sys

source, destination, port, text = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
family = socket.AF_INET6 if ":" in destination else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as sock:
    try:
        if source:
            sock.setsockopt(*((socket.IPPROTO_IPV6, 75) if family == socket.AF_INET6 else (socket.IPPROTO_IP, 19)), 1)
            sock.bind((source, 0))
        sock.sendto(text.encode(), (destination, port))
        print("PASSED")
    except OSError as error:
        print(type(error).__name__)
