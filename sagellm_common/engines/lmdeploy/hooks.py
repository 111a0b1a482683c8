"""The hooks our patches add to LMDeploy (third_party/patches/lmdeploy): which of them are there, and what we hang on
them. `overlay.use` comes first: asking imports LMDeploy.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from sagellm_common.engines.lmdeploy.overlay import LMDEPLOY_VERSION

HOOKS: dict[str, str] = {
    "prefix_store": "0001",
    "block_manager": "0002",
    "eviction_helper": "0002",
    "on_evict": "0002",
    "policy": "0003",
    "on_kv_written": "0004",
    "on_collective": "0004",
}
"""Name → the patch that brings it. Arguments: `lmdeploy/pytorch/extension.py` of a patched tree."""


PLUGIN = f"{__name__}:register"
VARIABLE = "LMDEPLOY_EXTENSIONS"


def register(ext: Any) -> None:
    """The plug-in, in the form LMDeploy's registry wants it: each scheduler of this process gets KV management of ours
    and asks our policy. `on_evict` is for those who keep LMDeploy's prefix store. Idempotent.
    """
    from sagellm_common.engines.lmdeploy.block_manager import KvBlockManager, KvEviction
    from sagellm_common.engines.lmdeploy.scheduler import POLICY

    ours: dict[str, Any] = {
        "block_manager": lambda cache_config, default: KvBlockManager(cache_config),
        "prefix_store": lambda cache_config, manager, default: manager.cache,
        "eviction_helper": lambda scheduler, kind: KvEviction(scheduler),
        "policy": POLICY,
    }
    for name in available() & ours.keys():
        setattr(ext, name, ours[name])


def enable() -> None:
    """Registers the plug-in, in this process and for those LMDeploy spawns. Without hooks there is nothing to do."""
    if not available():
        return
    named = os.environ.get(VARIABLE, "").split(",")
    if PLUGIN not in named:
        os.environ[VARIABLE] = ",".join([*filter(None, named), PLUGIN])
    from lmdeploy.pytorch.extension import EXT

    register(EXT)


def ask(name: str, scheduler: Any, value: Any, otherwise: Callable[[Any, Any], Any]) -> Any:
    """What LMDeploy's own loop asks through hook `policy`: plan first, then policy. `otherwise` without the hook."""
    if "policy" not in available():
        return otherwise(scheduler, value)
    from lmdeploy.pytorch.extension import EXT

    return EXT.ask(name, scheduler, value)


@functools.cache
def available() -> frozenset[str]:
    """The hooks of the LMDeploy in this process. Each step asks, and a module that is not there is sought each time."""
    try:
        from lmdeploy.pytorch.extension import EXT
    except ModuleNotFoundError:
        return frozenset()
    return frozenset(name for name in HOOKS if hasattr(EXT, name))


def missing() -> tuple[str, ...]:
    """The others, sorted by the patch they come with."""
    there = available()
    return tuple(name for name in HOOKS if name not in there)


def describe() -> str:
    """One line for logs and `sagellm status`: the engine, and what it has to do without."""
    lacking = missing()
    if not lacking:
        return f"LMDeploy {LMDEPLOY_VERSION}, all {len(HOOKS)} hooks"
    return f"LMDeploy {LMDEPLOY_VERSION}, without hooks {', '.join(lacking)}"
