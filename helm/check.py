"""`make chart-check`: the chart under both majors of helm, and its manifests against the API of each Kubernetes.

For each ci/*-values.yaml: lint --strict and template with helm 3 and helm 4, which must render the same, and each
manifest against the schemas of KUBERNETES, unknown fields refused.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from helm import schema, tools

CHART = Path(__file__).parent / "sagellm"
KUBERNETES = tuple(f"1.{minor}" for minor in range(28, 38))
TIMEOUT_S = 300.0


class Failed(Exception):
    """The text is what the tool said."""


def render(helm: Path, values: Path, *flags: str) -> list[dict[str, Any]]:
    """The manifests of a release `demo` in the namespace `llm`. Raises Failed."""
    text = _run([helm, "template", "demo", CHART, "--namespace", "llm", "-f", values, *flags])
    return [manifest for manifest in yaml.safe_load_all(text) if manifest]


def check(values: Path, helms: Sequence[Path]) -> int:
    """The number of manifests. Raises Failed."""
    for helm in helms:
        _run([helm, "lint", "--strict", "--quiet", CHART, "-f", values])
    rendered = [render(helm, values) for helm in helms]
    if any(manifests != rendered[0] for manifests in rendered):
        raise Failed(f"{' and '.join(helm.parent.name for helm in helms)} render different manifests")
    validate = Path(__file__).with_name("validate.py")
    _run([tools.validator_python(), validate, *KUBERNETES], yaml.safe_dump_all(rendered[0]))
    return len(rendered[0])


def _run(argv: Sequence[object], stdin: str = "") -> str:
    done = subprocess.run([str(part) for part in argv], input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise Failed(done.stdout + done.stderr)
    return done.stdout


def main() -> int:
    failed = schema.PATH.read_text() != schema.written()
    if failed:
        print(f"{schema.PATH} is out of date: run python -m helm.schema", file=sys.stderr)
    helms = tools.install()
    for values in sorted(CHART.glob("ci/*-values.yaml")):
        try:
            print(f"{values.name}: {check(values, helms)} manifests", flush=True)
        except Failed as err:
            print(f"{values.name}: {err}", file=sys.stderr)
            failed = True
    versions = ", ".join(helm.parent.name for helm in helms)
    print(f"{'FAILED' if failed else 'ok'}: {versions}; Kubernetes {', '.join(KUBERNETES)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
