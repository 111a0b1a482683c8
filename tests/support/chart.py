"""The chart as helm renders it, and its containers as kubelet would start them."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from helm import tools
from helm.check import CHART, render

Manifest = dict[str, Any]
CI_VALUES = sorted(CHART.glob("ci/*-values.yaml"))
OURS = ("router", "gateway", "prefill", "decode", "kv-store", "autoscaler")


def helms() -> list[Path]:
    """Those of `make chart-check`, else the one on PATH. Skips without any."""
    found = tools.installed() or [Path(path) for path in [shutil.which("helm")] if path]
    if not found:
        pytest.skip("helm is not here: `make chart-check` fetches it")
    return found


@dataclass(frozen=True, slots=True)
class Release:
    """Manifests of the release `demo` in the namespace `llm`."""

    manifests: tuple[Manifest, ...]

    @classmethod
    def of(cls, values: Path, *flags: str) -> Release:
        """By the newest helm there is."""
        return cls(tuple(render(helms()[-1], values, *flags)))

    def kind(self, *kinds: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest["kind"] in kinds]

    def workload(self, part: str) -> Manifest:
        (found,) = [w for w in self.kind("Deployment", "StatefulSet") if part_of(w) == part]
        return found

    def workloads(self) -> dict[str, Manifest]:
        """By part: ours, not etcd."""
        return {part_of(w): w for w in self.kind("Deployment", "StatefulSet") if part_of(w) in OURS}

    def config_text(self) -> str:
        (config,) = self.kind("ConfigMap")
        return str(config["data"]["config.yaml"])


def part_of(manifest: Manifest) -> str:
    return str(manifest["metadata"]["labels"]["app.kubernetes.io/component"])


def pod_of(workload: Manifest) -> Manifest:
    spec: Manifest = workload["spec"]["template"]["spec"]
    return spec


def container_of(workload: Manifest) -> Manifest:
    (container,) = pod_of(workload)["containers"]
    return container  # type: ignore[no-any-return]


def environment(container: Manifest, pod_name: str, pod_ip: str, secrets: dict[str, str]) -> dict[str, str]:
    """As kubelet sets it; `secrets` by key."""
    fields = {"metadata.name": pod_name, "status.podIP": pod_ip}
    env = {}
    for variable in container["env"]:
        source = variable.get("valueFrom", {})
        if "fieldRef" in source:
            env[variable["name"]] = fields[source["fieldRef"]["fieldPath"]]
        elif "secretKeyRef" in source:
            key = source["secretKeyRef"]["key"]
            if key in secrets or not source["secretKeyRef"].get("optional"):
                env[variable["name"]] = secrets[key]
        else:
            env[variable["name"]] = variable["value"]
    return env


def arguments(container: Manifest, env: dict[str, str], config: Path) -> list[str]:
    """With $(VARIABLES) replaced as kubelet does, and the mounted configuration by that file."""
    expanded = [re.sub(r"\$\((\w+)\)", lambda found: env[found[1]], text) for text in container["args"]]
    return [text.replace("/etc/sagellm/config.yaml", str(config)) for text in expanded]


def values_file(target: Path, values: Manifest) -> Path:
    target.write_text(yaml.safe_dump(values))
    return target
