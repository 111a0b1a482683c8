"""Manifests on stdin against the schemas of the versions of Kubernetes given, unknown fields refused.

Runs in the validator's own environment, see tools.py.
"""

import sys

import kubernetes_validate
import yaml


def main() -> int:
    problems = 0
    for manifest in yaml.safe_load_all(sys.stdin):
        name = f"{manifest['kind']}/{manifest['metadata']['name']}"
        for version in sys.argv[1:]:
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as err:
                print(f"{name}, Kubernetes {version}: {err.message}", file=sys.stderr)
                problems += 1
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
