"""What is logged: by us, by libraries, and of what failed."""

import json
import subprocess
import sys
from datetime import datetime

PROGRAM = """
import logging, sys
import structlog
from mesh import logs

def join(secret):
    raise ValueError("refused")

logs.configure(sys.stderr)
log = structlog.get_logger()
log.info("joined", node="n1")
log.debug("unheard")
try:
    join("hu" + "sh")
except ValueError:
    log.exception("failed")
    logging.getLogger("asyncio").exception("in a library")
"""


def test_every_line_is_json_and_none_tells_a_variable():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [
        ("joined", "info"),
        ("failed", "error"),
        ("in a library", "error"),
    ]
    assert lines[0]["node"] == "n1" and lines[2]["logger"] == "asyncio"
    times = [datetime.fromisoformat(line["timestamp"]) for line in lines]
    assert times == sorted(times) and all(line["timestamp"].endswith("Z") for line in lines)
    assert all("ValueError: refused" in line["exception"] for line in lines[1:])
    assert "hush" not in done.stderr, "a variable may be a key or a token"


def test_a_line_that_nobody_reads_stops_nothing():
    """The journal ends before the proxy's workers, at a shutdown."""
    argv = [sys.executable, "-c", PROGRAM + "print('went on')"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stderr.close()
        assert process.stdout.read() == "went on\n"
