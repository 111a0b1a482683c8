"""The hooks our patches add to LMDeploy (third_party/patches/lmdeploy): which of them are there.

`overlay.use` comes first: asking imports LMDeploy.
"""

from __future__ import annotations

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


def available() -> frozenset[str]:
    """The hooks of the LMDeploy in this process."""
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
