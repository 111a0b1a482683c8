"""Whether a change made anything slower, by turns of both trees: `python -m bench.ci_gate --help`."""
