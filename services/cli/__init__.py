"""The command line, and the supervisor of clusters on one machine."""

import os

# Read when grpc is imported, so here. We fork only to exec; its fork handlers would complain on stderr, and do not
# bear it that other threads call into it.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
