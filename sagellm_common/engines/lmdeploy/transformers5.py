"""transformers 5 for LMDeploy 0.11.0, which was written for transformers 4.

Version 5 keeps rotary embeddings' settings in `config.rope_parameters`; LMDeploy asks a configuration for rope_theta
and rope_scaling.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Gives every model configuration the two names back. Does nothing with transformers 4. Idempotent."""
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        return
    base = transformers.PretrainedConfig
    base.rope_theta = property(_rope_theta, _set_rope_theta)
    base.rope_scaling = property(_rope_scaling, _set_rope_scaling)


def _parameters(config: Any) -> dict[str, Any]:
    return config.__dict__.get("rope_parameters") or {}


def _rope_theta(config: Any) -> float:
    theta = _parameters(config).get("rope_theta", getattr(config, "default_theta", None))
    if theta is None:
        raise AttributeError("this configuration has no rope_theta")
    return float(theta)


def _set_rope_theta(config: Any, theta: float | None) -> None:
    if theta is not None:
        config.__dict__.setdefault("rope_parameters", {})["rope_theta"] = theta


def _rope_scaling(config: Any) -> dict[str, Any] | None:
    scaling = {name: value for name, value in _parameters(config).items() if name != "rope_theta"}
    return None if scaling.get("rope_type", "default") == "default" else scaling


def _set_rope_scaling(config: Any, scaling: dict[str, Any] | None) -> None:
    if scaling:
        config.__dict__.setdefault("rope_parameters", {}).update(scaling)
