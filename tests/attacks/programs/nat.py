"""The kernel of a node does what a NodePort does: what comes to PORT of the node goes on to TO TO_PORT, and leaves under the
node's own address. argv: PORT TO TO_PORT. Says "ready"; until SIGTERM."""

import signal
import socket
import sys

from netfilter import (
    BEFORE_ROUTING,
    IPV4,
    IPV6,
    OUTPUT,
    POSTROUTING,
    PREROUTING,
    SOURCE_NAT,
    add_nat,
    attribute,
    delete,
    expression,
    nest,
    number,
    to_port,
)

port, to, to_port_number = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
family, packed = (IPV6, socket.inet_pton(socket.AF_INET6, to)) if ":" in to else (IPV4, socket.inet_aton(to))
TABLES = ("from-outside", "from-here", "as-the-node")
towards = (
    *to_port(port),
    expression("immediate", attribute(1, 1), nest(2, attribute(1, packed))),
    expression("immediate", attribute(1, 2), nest(2, attribute(1, number(to_port_number)))),
    expression("nat", attribute(1, 1), attribute(2, family), attribute(3, 1), attribute(5, 2)),
)


def stop(*_: object) -> None:
    for table in TABLES:
        delete(table, family)
    sys.exit()


signal.signal(signal.SIGTERM, stop)
add_nat(TABLES[0], PREROUTING, BEFORE_ROUTING, *towards, family=family)
add_nat(TABLES[1], OUTPUT, BEFORE_ROUTING, *towards, family=family)
add_nat(TABLES[2], POSTROUTING, SOURCE_NAT, *to_port(to_port_number), expression("masq"), family=family)
print("ready", flush=True)
while True:
    signal.pause()
