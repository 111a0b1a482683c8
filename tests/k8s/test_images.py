"""What the chart relies on in the Dockerfiles. They are not built here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "k8s" / "images").glob("*.Dockerfile"))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_is_what_the_chart_runs(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    (user,) = re.findall(r"^USER (\d+):", text, re.M)
    pods = (ROOT / "helm" / "sagellm" / "templates" / "_helpers.tpl").read_text()
    assert f"runAsUser: {user}\n" in pods
    assert set(re.findall(r"^FROM (\S+)", text, re.M)) == {"${BASE}"}
    assert "# syntax=" not in text, "would be fetched from a registry"
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M):
        assert all((ROOT / source).exists() for source in sources.split())


def test_the_flavours_of_the_ci_values_are_there() -> None:
    values = (ROOT / "helm" / "sagellm" / "ci").glob("*.yaml")
    tags = {tag for path in values for tag in re.findall(r"image: {tag: (\w+)}", path.read_text())}
    assert tags and tags <= {path.stem for path in DOCKERFILES}
