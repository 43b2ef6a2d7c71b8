"""Python imports this at its start when the folder is on PYTHONPATH: it watches for network calls.

Every look-up of a name and every connection beyond this machine is written to the file
OUTSIDE_CALLS and fails.
"""

import os
import sys

HERE = ("127.0.0.1", "::1", "localhost", "", None)


def _watch(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in HERE:
        with open(os.environ["OUTSIDE_CALLS"], "a", encoding="utf-8") as log:
            log.write(f"{host}\n")
        raise OSError(f"no network in this test: {host}")


if "OUTSIDE_CALLS" in os.environ:
    sys.addaudithook(_watch)
