"""Has the kernel lose what it knows of connections under way. argv: the pinned map `arriving`, fill (until no record finds
room), clear (of what filled it) or remove (all records)."""

import sys
from pathlib import Path

from nodeagent.datapath_api import MapFull
from nodeagent.maps import BpfMap

NETNS = (1).to_bytes(8, "little")  # nobody's


def junk(number: int, size: int) -> bytes:
    return NETNS + number.to_bytes(size - len(NETNS), "little")


records = BpfMap.open(Path(sys.argv[1]))
if sys.argv[2] == "fill":
    try:
        for number in range(records.entries_max + 1):
            records.put(junk(number, records.key_size), bytes(records.value_size))
    except MapFull:
        print("full")
else:
    gone = [key for key in records.items() if sys.argv[2] == "remove" or key.startswith(NETNS)]
    print(sum(map(records.delete, gone)))
