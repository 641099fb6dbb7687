"""An HBONE client by hand (ssl and h2), with the SVID a node keeps for one of its workloads. Prints {"answer": …}."""

import argparse
import json
import socket
import ssl
import tempfile
from pathlib import Path

import h2.config
import h2.connection
import h2.events

parser = argparse.ArgumentParser()
for name in ("state", "who", "dial", "authority", "forwarded", "sni"):
    parser.add_argument(f"--{name}", required=True)
options = parser.parse_args()


def load_svid(context: ssl.SSLContext) -> None:
    """Chain and key of --who as the agent of this node stores them: a JSON file for each identity."""
    namespace, account = options.who.split("/")
    for path in Path(options.state).rglob("*"):
        if not path.is_file() or b'"chain"' not in (text := path.read_bytes()):
            continue
        stored = json.loads(text)
        if stored["spiffe"].endswith(f"/ns/{namespace}/sa/{account}"):
            with tempfile.NamedTemporaryFile("w") as pem:
                pem.write(stored["chain"] + stored["key"])
                pem.flush()
                context.load_cert_chain(pem.name)
            return
    raise SystemExit(f"{options.state} holds no certificate of {options.who}")


def ask() -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(Path(options.state) / "bundle.pem")
    load_svid(context)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((options.dial, 15008), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=options.sni) as conn,
    ):
        h2c = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, header_encoding="utf-8", validate_outbound_headers=False)
        )
        h2c.initiate_connection()
        headers = [(":method", "CONNECT"), (":authority", options.authority)]
        if options.forwarded:
            headers.append(("forwarded", options.forwarded))
        h2c.send_headers(1, headers)
        conn.sendall(h2c.data_to_send())
        while data := conn.recv(65536):
            for event in h2c.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    found = dict(event.headers)
                    reason = found.get("x-pillion-reason", "")
                    return found[":status"] + (f" {reason}" if reason else "")
                if isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                    return repr(event)
            conn.sendall(h2c.data_to_send())
    return "closed"


try:
    answer = ask()
except OSError as error:
    answer = repr(error)
print(json.dumps({"answer": answer}))
