"""`python -m bench`: what `make bench` runs; `python -m bench run --preset ci`: what the perf gate compares."""

import sys

if sys.argv[1:2] == ["run"]:
    from bench.run import main as run

    sys.exit(run(sys.argv[2:]))

from bench.serving import main

main()
