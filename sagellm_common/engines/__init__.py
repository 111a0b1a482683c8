"""Inference engines behind one contract (`base.py`). Heavy ones are imported when asked for."""

from __future__ import annotations

from collections.abc import Callable

from sagellm_common.core.config import Config
from sagellm_common.core.registry import Registry
from sagellm_common.engines.base import Engine

_ENGINES: Registry[Callable[[Config], Engine]] = Registry("engine.kind")


@_ENGINES.register("lmdeploy")
def _lmdeploy(config: Config) -> Engine:
    from sagellm_common.engines.lmdeploy.engine import LmdeployEngine

    return LmdeployEngine(config)


@_ENGINES.register("vllm")
def _vllm(config: Config) -> Engine:
    from sagellm_common.engines.vllm.engine import VllmEngine

    return VllmEngine(config)


def make_engine(config: Config) -> Engine:
    """The engine named by engine.kind, not started. Raises ConfigError."""
    return _ENGINES.get(config.engine.kind)(config)
