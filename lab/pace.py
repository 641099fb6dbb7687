"""How much slower than usual this machine is, and how long to wait for what will come."""

from __future__ import annotations

import os

SLOW = max(1.0, float(os.environ.get("PILLION_SLOW", "1")))  # a VM in emulation: 6
PATIENCE = 3.0 * SLOW  # where the time claims nothing: the machine may have other work
