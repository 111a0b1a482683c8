"""The transport settings of a running process: as they were loaded, and what the control plane has changed since."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import yaml
from pydantic import ValidationError

from sagellm_common.core.config import TransportConfig
from sagellm_common.core.config_loader import transport_presets
from sagellm_common.core.errors import ConfigError

AT_RUN_TIME = (
    "wire_dtype",
    "link_bytes_per_s",
    "chunk_bytes",
    "pipeline_depth",
    "fusion",
    "overlap",
    "overlap_min_bytes",
    "segment_min_bytes",
)
"""Keys that each transfer looks up anew. The others are part of what was agreed with peers, or of open sockets."""


BUFFERED = ("gloo", "nccl")
"""Byte paths that keep messages in buffers of their own; only they can have a `pipeline_depth` of them under way."""


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that is no longer as it was loaded; values as YAML has them."""

    key: str
    loaded: str
    now: str


class KVTransportConfig:
    """Byte paths ask `now` at each transfer; `set` counts from the next one on, for the life of the process."""

    def __init__(self, loaded: TransportConfig) -> None:
        self.loaded = loaded
        self._now = loaded

    @property
    def now(self) -> TransportConfig:
        return self._now

    def set(self, settings: Mapping[str, str]) -> TransportConfig:
        """All of `settings` (values as YAML) or, with an error, none. Returns what is in force.

        Raises ConfigError naming the key, the value and what is allowed.
        """
        problems = [problem for key in settings if (problem := _not_changeable(key))]
        if "pipeline_depth" in settings and self.loaded.backend not in BUFFERED:
            problems.append(_no_buffers(self.loaded.backend))
        if problems:
            raise ConfigError("; ".join(problems))
        try:
            values = {key: yaml.safe_load(text) for key, text in settings.items()}
            self._now = TransportConfig.model_validate(self._now.model_dump() | values)
        except ValidationError as err:
            raise ConfigError(
                "; ".join(
                    f"transport.{e['loc'][0]}: {e['input']!r} is not allowed, "
                    + e["msg"].replace("Input should be", "must be")
                    for e in err.errors()
                )
            ) from err
        except yaml.YAMLError as err:
            raise ConfigError(f"{dict(settings)} holds what is no YAML value: {err}") from err
        return self._now

    def changes(self) -> list[Change]:
        """What differs from the file."""
        pairs = [(key, getattr(self.loaded, key), getattr(self._now, key)) for key in AT_RUN_TIME]
        return [Change(key, _text(loaded), _text(now)) for key, loaded, now in pairs if loaded != now]

    def in_force(self) -> dict[str, str]:
        """The keys that can be changed, and their values."""
        return {key: _text(getattr(self._now, key)) for key in AT_RUN_TIME}


def check_depth(cfg: TransportConfig) -> None:
    """Raises ConfigError where a depth is asked for, by itself and not by a preset, of a byte path that has none."""
    unasked = {TransportConfig().pipeline_depth, transport_presets().get(cfg.preset, {}).get("pipeline_depth")}
    if cfg.backend not in BUFFERED and cfg.pipeline_depth not in unasked:
        raise ConfigError(_no_buffers(cfg.backend))


def _no_buffers(backend: str) -> str:
    return (
        f"transport.pipeline_depth: over {backend!r} messages wait in no buffers whose number could be chosen (over "
        f"{', '.join(BUFFERED)} they do); leave it out, and set chunk_bytes for how much is moved at a time"
    )


def _text(value: object) -> str:
    """As YAML has it."""
    return "null" if value is None else str(value)


def _not_changeable(key: str) -> str:
    if key in AT_RUN_TIME:
        return ""
    if key in TransportConfig.model_fields:
        return f"transport.{key} cannot be changed while a worker runs: set it in the file and restart the worker"
    near = difflib.get_close_matches(key, AT_RUN_TIME, n=1)
    return f"transport has no key {key!r}; {f'did you mean {near[0]}' if near else 'known: ' + ', '.join(AT_RUN_TIME)}?"
