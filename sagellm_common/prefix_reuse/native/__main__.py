"""Compiles `prefix_index.cpp`."""

from __future__ import annotations

import argparse
import sys

from sagellm_common.core.errors import ConfigError
from sagellm_common.prefix_reuse.native import build


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sagellm_common.prefix_reuse.native", description=__doc__)
    parser.add_argument("--optional", action="store_true", help="exit code 0 when it cannot be built")
    args = parser.parse_args()
    try:
        print(build())
    except ConfigError as error:
        print(
            f"block hashes and the prefix index were not compiled, Python does them: {error.message}", file=sys.stderr
        )
        raise SystemExit(0 if args.optional else 1) from None


if __name__ == "__main__":
    main()
