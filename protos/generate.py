"""Generate the Python code of the wire contract; `--check` fails when the committed code is stale."""

from __future__ import annotations

import argparse
import filecmp
import importlib.util
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "sagellm_common" / "rpc" / "gen"
PACKAGE = "sagellm_common.rpc.gen.sagellm.v1"


def package_dir(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def include_flags(protos: Path = ROOT / "protos") -> list[str]:
    """Where protoc finds our files, google.rpc and the well-known types."""
    google = package_dir("google.rpc").parent.parent
    builtin = package_dir("grpc_tools") / "_proto"
    return [f"-I{protos}", f"-I{google}", f"-I{builtin}"]


def generate(out: Path) -> list[Path]:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` below `out`; return them, relative to it."""
    from grpc_tools import protoc

    sources = sorted(str(p) for p in (ROOT / "protos" / "sagellm").rglob("*.proto"))
    flags = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", *include_flags(), *flags, *sources]):
        raise SystemExit("protoc failed")
    files = sorted(p for p in out.rglob("*_pb2*") if p.suffix in (".py", ".pyi"))
    for path in files:
        # protoc writes imports as if `out` were on sys.path.
        path.write_text(re.sub(r"^from sagellm\.v1 import", f"from {PACKAGE} import", path.read_text(), flags=re.M))
    return [p.relative_to(out) for p in files]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed code, write nothing")
    if not parser.parse_args().check:
        print(f"generated {len(generate(OUT))} files in {OUT.relative_to(ROOT)}")
        return 0
    with tempfile.TemporaryDirectory() as tmp:
        fresh = set(generate(Path(tmp)))
        committed = {p.relative_to(OUT) for p in OUT.rglob("*_pb2*") if p.suffix in (".py", ".pyi")}
        stale = sorted(fresh ^ committed) + [
            p for p in sorted(fresh & committed) if not filecmp.cmp(Path(tmp) / p, OUT / p, shallow=False)
        ]
    if stale:
        print("generated code is stale, run `make proto`:", *stale, sep="\n  ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
