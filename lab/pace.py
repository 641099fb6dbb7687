"""How much slower than usual this machine is: what only waits for something to happen waits so much longer."""

from __future__ import annotations

import os

SLOW = max(1.0, float(os.environ.get("PILLION_SLOW", "1")))  # a VM in emulation: 6
