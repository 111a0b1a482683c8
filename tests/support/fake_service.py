"""Stands in for a service in tests of the supervisor: says it is ready, serves 200 on /ready, and does as FAKE says.

FAKE is "<process id>=<behaviour>,…": `fail` exits with a message, `hang` is never ready, `stubborn` ignores SIGTERM,
`chatty` prints a lot. FAKE_JOURNAL is a file where each process notes its start and stop.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role")
    parser.add_argument("--id", default="")
    parser.add_argument("--port", type=int, default=0)
    args, _ = parser.parse_known_args()
    process_id = args.id or args.role
    behaviour = dict(pair.split("=") for pair in os.environ.get("FAKE", "").split(",") if pair).get(process_id)
    journal = Path(os.environ["FAKE_JOURNAL"])

    def note(what: str) -> None:
        with journal.open("a") as file:
            file.write(f"{what} {process_id}\n")

    if behaviour == "fail":
        print("INVALID_CONFIG: no such thing", file=sys.stderr)
        sys.exit(2)
    stopped = threading.Event()
    ignore = behaviour == "stubborn"
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignore else lambda *_: stopped.set())
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Ready)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if behaviour != "hang":
        address = f"127.0.0.1:{server.server_address[1]}"
        print("not the ready line")
        note("start")
        print(json.dumps({"ready": True, "id": process_id, "pid": os.getpid(), "address": address}), flush=True)
    if behaviour == "chatty":
        print("\n".join(["y" * 99] * 5000), flush=True)
        note("wrote")
    stopped.wait()
    note("stop")


if __name__ == "__main__":
    main()
