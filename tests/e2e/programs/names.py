"""Asks the DNS. argv: "udp" or "tcp", type, name. Prints the answers' texts as JSON."""

import json
import sys

import dns.message
import dns.query
import dns.rdatatype

how, kind, name = sys.argv[1:]
query = dns.message.make_query(name, dns.rdatatype.from_text(kind))
answer = (dns.query.tcp if how == "tcp" else dns.query.udp)(query, "127.0.0.53", timeout=3)
print(json.dumps([record.to_text() for rrset in answer.answer for record in rrset]))
