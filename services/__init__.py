"""The processes of a cluster, one package each: `python -m services.<name>`."""

import os

# gRPC reads this once, when it is imported. By default its event engine wakes three threads of its own for each message
# before Python's poller hears of it; polled by Python's own thread, an idle round trip takes a fifth less.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_poller_for_python")
