"""A worker's process begins without collections and ends at once, but not rudely."""

from __future__ import annotations

import gc
import subprocess
import sys

from sagellm_common.core.process import no_collections, started

SCRIPT = """
import atexit, sys, threading
from sagellm_common.core.process import leave
atexit.register(lambda: print("said goodbye", file=sys.stderr))
threading.Thread(target=threading.Event().wait).start()  # the interpreter would wait for it, for ever
print("the last line", end="")
leave(7)
"""


def test_leaving_runs_exit_handlers_flushes_and_waits_for_no_thread() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "the last line", "said goodbye\n")


def test_collections_rest_until_the_worker_serves_or_fails() -> None:
    with no_collections():
        assert not gc.isenabled()
        started()
        assert gc.isenabled()
        gc.unfreeze()
    with no_collections():
        pass
    assert gc.isenabled()
