"""Manifests on stdin against the schemas of the versions of Kubernetes given, unknown fields refused; those of KEDA and
of the Prometheus operator against the models of these, the same for all versions.

Runs in the validator's own environment, see tools.py.
"""

import sys
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import yaml
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator
from pydantic import ValidationError

CUSTOM = {"keda.sh/v1alpha1": keda, "monitoring.coreos.com/v1": prometheus_operator}


def problems_of(manifest: dict[str, Any], versions: list[str]) -> Iterator[str]:
    models = CUSTOM.get(manifest["apiVersion"])
    if models is not None:
        try:
            known = getattr(models, manifest["kind"]).model_validate(manifest)
        except ValidationError as err:
            yield str(err)
            return
        yield from unknown(manifest, known.model_dump(mode="json", by_alias=True, exclude_unset=True), "")
        return
    for version in versions:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as err:
            yield f"Kubernetes {version}: {err.message}"


def unknown(given: Any, kept: Any, path: str) -> Iterator[str]:
    """Fields that a model has dropped or does not declare."""
    if isinstance(given, dict):
        for name, value in given.items():
            if not isinstance(kept, dict) or name not in kept:
                yield f"{path}.{name} is no field of it"
            else:
                yield from unknown(value, kept[name], f"{path}.{name}")
    elif isinstance(given, list) and isinstance(kept, list):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from unknown(one, other, f"{path}[{index}]")


def main() -> int:
    problems = 0
    for manifest in yaml.safe_load_all(sys.stdin):
        name = f"{manifest['kind']}/{manifest['metadata']['name']}"
        for problem in problems_of(manifest, sys.argv[1:]):
            print(f"{name}, {problem}", file=sys.stderr)
            problems += 1
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
