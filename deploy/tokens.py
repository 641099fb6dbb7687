"""``tokens.py PORT``: of the Vagrant lab alone: who sends a node's name in a line gets a fresh join token for it, or nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from socketserver import StreamRequestHandler, TCPServer


class Handler(StreamRequestHandler):
    timeout = 10

    def handle(self) -> None:
        node = self.rfile.readline(20).decode(errors="replace").strip()
        if re.fullmatch(r"n[0-9]{1,2}", node):
            command = ["/usr/local/bin/pillion", "node", "token", node]
            self.wfile.write(subprocess.run(command, stdout=subprocess.PIPE, timeout=30, check=False).stdout)


TCPServer.allow_reuse_address = True
TCPServer(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
