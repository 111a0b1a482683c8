"""`python -m bench.benchmarks.transfer`, which is what `sagellm bench transfer` runs."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.benchmarks.transfer.measure import FULL, KIB, MIB, QUICK, Preset, measure
from bench.benchmarks.transfer.report import save, table, targets
from sagellm_common.comm_backend.backends import MODULES

UNITS = {"K": KIB, "M": MIB}


def sizes(text: str) -> tuple[int, ...]:
    """ "16K,1M" in bytes."""
    found = []
    for part in text.split(","):
        number, unit = part[:-1], part[-1:].upper()
        if not number.isdigit() or int(number) == 0 or unit not in UNITS:
            raise argparse.ArgumentTypeError(f"{part!r} is no size; write 16K or 1M, with commas in between")
        found.append(int(number) * UNITS[unit])
    return tuple(found)


def backends(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := [name for name in chosen if name not in MODULES]:
        raise argparse.ArgumentTypeError(f"unknown byte path {', '.join(unknown)}; known: {', '.join(MODULES)}")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="sagellm bench transfer",
        description="KV between two processes over every byte path, beside plain Gloo, plain Mooncake and memcpy.",
    )
    parser.add_argument("--backends", type=backends, default=tuple(MODULES), help="some of them, with commas")
    parser.add_argument("--sizes", type=sizes, help="payloads, as 1M,128M")
    parser.add_argument("--blocks", type=sizes, help="block sizes, as 16K,1M")
    parser.add_argument("--full", action="store_true", help="all payloads up to 512 MiB: four minutes; else one")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write OUT, and .md and .png beside it")
    args = parser.parse_args(argv)
    preset: Preset = FULL if args.full else QUICK
    preset = replace(
        preset, payload_bytes=args.sizes or preset.payload_bytes, block_bytes=args.blocks or preset.block_bytes
    )
    began_s = time.monotonic()

    def progress(doing: str) -> None:
        print(f"[{time.monotonic() - began_s:5.0f} s] {doing}", file=sys.stderr, flush=True)

    found = asyncio.run(measure(args.backends, preset, progress))
    conditions = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": f"{os.getloadavg()[0]:.1f} at the end",
        "seconds": round(time.monotonic() - began_s),
    }
    print(table(found))
    print()
    for target in targets(found):
        print(target)
    for name, reason in found.missing.items():
        print(f"not measured: {name}: {reason}")
    if args.json:
        for path in save(found, conditions, args.json):
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Threads of Gloo and Mooncake may still wait for sources that stopped or died: they abort an interpreter that
    # ends under them.
    os._exit(code)
