"""An HBONE client by hand (ssl and h2), with the SVID a node keeps for one of its workloads. Prints {"answer": …}, of several
--state {"answers": […]}; with --stay S, once it is served, whether the peer ends the connection within S seconds: "200 ended" or
"200 open"."""

import argparse
import json
import shlex
import socket
import ssl
import subprocess
import time
from pathlib import Path

import h2.events

from lab import peer
from mesh.ports import HBONE_PORT

parser = argparse.ArgumentParser()
parser.add_argument("--state", required=True, nargs="+")
for name in ("who", "dial", "authority", "forwarded", "sni"):
    parser.add_argument(f"--{name}", required=True)
parser.add_argument("--before", default="true", help="a command that opens a way which the agent closes again: run last")
parser.add_argument("--stay", type=float, default=0.0)
options = parser.parse_args()


def ask(state: str) -> str:
    context = peer.certified(Path(state), options.who)
    subprocess.run(shlex.split(options.before), check=False, stderr=subprocess.DEVNULL)
    with (
        socket.create_connection((options.dial, HBONE_PORT), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=options.sni) as conn,
    ):
        own = peer.http2()
        own.send_headers(1, peer.tunnel(options.authority, options.forwarded))
        conn.sendall(own.data_to_send())
        while data := conn.recv(65536):
            for event in own.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    found = dict(event.headers)
                    reason = found.get("x-pillion-reason", "")
                    if found[":status"] == "200" and options.stay:
                        return f"200 {ended(conn, options.stay)}"
                    return found[":status"] + (f" {reason}" if reason else "")
                if isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                    return repr(event)
            conn.sendall(own.data_to_send())
    return "closed"


def ended(conn: ssl.SSLSocket, seconds: float) -> str:
    until = time.monotonic() + seconds
    try:
        while (left := until - time.monotonic()) > 0:
            conn.settimeout(left)
            if not conn.recv(65536):
                return "ended"
    except TimeoutError:
        pass
    except OSError:
        return "ended"
    return "open"


answers = []
for each in options.state:
    try:
        answers.append(ask(each))
    except OSError as error:
        answers.append(repr(error))
print(json.dumps({"answers": answers} if answers[1:] else {"answer": answers[0]}))
