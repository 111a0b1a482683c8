"""What is read from a Hugging Face checkpoint before an engine loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from sagellm_common.core.errors import ConfigError

FINGERPRINT_BYTES = 1 << 20


def model_fingerprint(path: Path) -> str:
    """Hash of the configuration and of the ends of each weight file: cheap, and different for different weights."""
    digest = xxhash.xxh3_128((path / "config.json").read_bytes())
    for weights in sorted(path.glob("*.safetensors")):
        size = weights.stat().st_size
        digest.update(f"{weights.name}:{size}".encode())
        with weights.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def read_model_config(path: Path) -> dict[str, Any]:
    """The checkpoint's config.json. Raises ConfigError when it is not a Hugging Face checkpoint."""
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(f"model.path: {str(path)!r} holds no config.json; give a Hugging Face checkpoint directory")
    if not any(path.glob("*.safetensors")):
        raise ConfigError(f"model.path: {str(path)!r} holds no *.safetensors; convert the weights first")
    try:
        config: dict[str, Any] = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.path: {file} is not valid JSON: {error}") from None
    return config


def eos_token_ids(path: Path, config: dict[str, Any]) -> frozenset[int]:
    """generation_config.json says it where there is one, config.json otherwise."""
    generation = path / "generation_config.json"
    eos = (json.loads(generation.read_text()) if generation.is_file() else {}).get("eos_token_id")
    eos = config.get("eos_token_id") if eos is None else eos
    return frozenset([eos] if isinstance(eos, int) else eos or ())
