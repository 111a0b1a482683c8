"""Where things that can be made again are kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_home(env: Mapping[str, str] = os.environ) -> Path:
    """Prepared models and compiled kernels: `$SAGELLM_CACHE`, else `~/.cache/sagellm`."""
    return Path(env.get("SAGELLM_CACHE") or Path.home() / ".cache" / "sagellm")
