"""Compiles `pieces.cpp`."""

from __future__ import annotations

import argparse
import sys

from sagellm_common.comm_backend.native import build
from sagellm_common.core.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sagellm_common.comm_backend.native", description=__doc__)
    parser.add_argument("--optional", action="store_true", help="exit code 0 when it cannot be built")
    args = parser.parse_args()
    try:
        print(build())
    except ConfigError as error:
        print(f"KV copies and digests were not compiled, Python does them: {error.message}", file=sys.stderr)
        raise SystemExit(0 if args.optional else 1) from None


if __name__ == "__main__":
    main()
