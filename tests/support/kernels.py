"""The compiled CPU kernels for tests: built once per machine, skipped where they cannot be."""

from __future__ import annotations

import pytest

from sagellm_common.core.cxx import compiler
from sagellm_common.engines.lmdeploy.kernels.build import build, supported_isas
from sagellm_common.engines.lmdeploy.kernels.native import NativeOps


def native(isa: str) -> NativeOps:
    if isa not in supported_isas():
        pytest.skip(f"this CPU has no {isa}")
    if compiler() is None:
        pytest.skip("no C++ compiler; install g++")
    build(isa)
    return NativeOps(isa)
