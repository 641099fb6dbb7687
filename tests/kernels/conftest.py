"""Two machines with two kernels: half an hour in emulation, so only where it is asked for (make test-kernels)."""

import os

collect_ignore_glob = [] if os.environ.get("PILLION_HOSTS") else ["test_*.py"]
