"""What the simulated hardware costs: coefficients of the production cost model's formulas, and how much KV fits.

A profile comes from a file that a calibration wrote, or from the roofline of a device and a model.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sagellm_common.core.errors import ConfigError
from sagellm_common.core.registry import Registry

Costs = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds: prefill step a + b·tokens + c·(end² − start²), decode step a + b·context + c·batch."""

    prefill: Costs
    decode: Costs
    link_latency_s: float
    link_bytes_per_s: float
    """Of one worker's network card, each way."""
    kv_bytes_per_token: int
    num_layers: int
    kv_tokens: int
    """KV that fits into one worker."""
    max_batch: int = 256
    prefill_chunk_tokens: int = 8192
    larger_batches: tuple[tuple[int, Costs], ...] = ()
    """(sequences, decode costs from so many on), rising."""
    prefill_noise: tuple[float, ...] = ()
    """What prefill steps took as shares of what the costs say, to draw from; empty: all take just that."""
    overhead_s: float = 0.0
    """Of a request outside the engines until its first token is there: client, router, sessions."""

    def decode_costs(self, batch: int) -> Costs:
        found = self.decode
        for sequences, costs in self.larger_batches:
            if batch < sequences:
                break
            found = costs
        return found

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def load_profile(name: str) -> Profile:
    """One of PROFILES, or of a file that `Profile.save` wrote. Raises ConfigError."""
    path = Path(name)
    if not path.suffix:
        return PROFILES.get(name)
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
        if (names := {field.name for field in fields(Profile)}) != state.keys():
            raise ValueError(f"it has the keys {', '.join(state)}; {', '.join(sorted(names))} are needed")
        state["prefill"], state["decode"] = _costs(state["prefill"]), _costs(state["decode"])
        state["larger_batches"] = tuple((int(batch), _costs(costs)) for batch, costs in state["larger_batches"])
        state["prefill_noise"] = tuple(float(share) for share in state["prefill_noise"])
        return Profile(**state)
    except (OSError, ValueError, TypeError, AttributeError) as err:
        raise ConfigError(f"--profile {path}: {err}; `sagellm bench calibrate` writes one") from err


def _costs(values: Any) -> Costs:
    a, b, c = (float(value) for value in values)
    return a, b, c


@dataclass(frozen=True, slots=True)
class Device:
    """Datasheet numbers; `efficiency` is the share of them that serving engines reach."""

    flops: float
    memory_bytes_per_s: float
    memory_bytes: float
    network_bytes_per_s: float
    flops_efficiency: float = 0.5
    memory_efficiency: float = 0.7


@dataclass(frozen=True, slots=True)
class Model:
    parameters: float
    num_layers: int
    num_kv_heads: int
    num_heads: int
    head_dim: int
    bytes_per_value: int = 2


H200 = Device(flops=989e12, memory_bytes_per_s=4.8e12, memory_bytes=141e9, network_bytes_per_s=50e9)
A100 = Device(flops=312e12, memory_bytes_per_s=2.0e12, memory_bytes=80e9, network_bytes_per_s=25e9)
LLAMA_8B = Model(8.0e9, 32, 8, 32, 128)
LLAMA_70B = Model(70.6e9, 80, 8, 64, 128)


def roofline(device: Device, model: Model, num_devices: int = 1) -> Profile:
    """Prefill is bound by arithmetic: 2 flops per parameter and token, and 4·heads·head_dim·layers per attended pair
    (half of end² − start²). Decode is bound by memory: all weights once a step, all KV of the context once."""
    kv_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * model.bytes_per_value
    weights = model.parameters * model.bytes_per_value
    flops = device.flops * device.flops_efficiency * num_devices
    memory = device.memory_bytes_per_s * device.memory_efficiency * num_devices
    room = 0.9 * device.memory_bytes * num_devices - weights
    if room <= 0:
        raise ConfigError(f"a model of {weights / 1e9:.0f} GB does not fit {num_devices} devices")
    pair = 4 * model.num_heads * model.head_dim * model.num_layers
    overhead_s = 2e-3  # a step's launches and scheduling
    return Profile(
        prefill=(overhead_s, 2 * model.parameters / flops, pair / 2 / flops),
        decode=(overhead_s + weights / memory, kv_bytes / memory, 2 * model.parameters / flops),
        link_latency_s=1e-3,
        link_bytes_per_s=device.network_bytes_per_s * num_devices,
        kv_bytes_per_token=kv_bytes,
        num_layers=model.num_layers,
        kv_tokens=int(room / kv_bytes),
    )


PROFILES: Registry[Profile] = Registry("profile")
PROFILES.register("h200-8b")(roofline(H200, LLAMA_8B))
PROFILES.register("a100-8b")(roofline(A100, LLAMA_8B))
PROFILES.register("h200x4-70b")(roofline(H200, LLAMA_70B, 4))
