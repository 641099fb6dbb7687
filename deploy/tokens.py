"""``tokens.py PORT``: of the Vagrant lab alone: GET /NODE answers with a fresh join token for that node."""

from __future__ import annotations

import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Handler(BaseHTTPRequestHandler):
    timeout = 10

    def do_GET(self) -> None:
        node = self.path[1:]
        if not re.fullmatch(r"n[0-9]{1,2}", node):
            self.send_error(404)
            return
        done = subprocess.run(["/usr/local/bin/pillion", "node", "token", node], capture_output=True, timeout=30, check=False)
        if done.returncode:
            self.send_error(503, done.stderr.decode(errors="replace").splitlines()[0][:200])
            return
        self.send_response(200)
        self.send_header("content-length", str(len(done.stdout)))
        self.end_headers()
        self.wfile.write(done.stdout)


HTTPServer(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
