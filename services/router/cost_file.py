"""The learned costs in a file, so that a router's restart does not forget them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sagellm_common.core.config import RouterConfig
from sagellm_common.core.errors import ConfigError, InvalidRequest
from sagellm_common.scheduler_ir.cost_model import CostModel

log = logging.getLogger(__name__)

SAVE_EVERY_S = 60.0


def cost_path(config: RouterConfig) -> Path | None:
    return Path(config.cost_model_path).expanduser() if config.cost_model_path else None


def load_costs(path: Path) -> CostModel:
    """Empty where there is no file yet, or none that can be read: that is said. Raises ConfigError: no directory."""
    if not path.parent.is_dir():
        raise ConfigError(f"router.cost_model_path {path}: {path.parent} is no directory; make it")
    try:
        return CostModel.from_dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        log.info("no learned costs in %s yet", path)
    except InvalidRequest as err:
        log.warning("the costs are learned from nothing: %s: %s", path, err.message)
    except (OSError, ValueError) as err:
        log.warning("the costs are learned from nothing: %s cannot be read: %s", path, err)
    return CostModel()


@asynccontextmanager
async def kept(costs: CostModel, path: Path, every_s: float = SAVE_EVERY_S) -> AsyncIterator[None]:
    """Writes them to the file every so often during the block, and at its end."""

    async def save() -> None:
        try:
            await asyncio.to_thread(_write, path, json.dumps(costs.to_dict()))
        except OSError as err:
            log.warning("the learned costs cannot be kept in %s: %s", path, err)

    async def keep_saving() -> None:
        last = False
        while not last:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    last = await over.wait()
            await save()

    over = asyncio.Event()
    saving = asyncio.create_task(keep_saving(), name="costs")
    try:
        yield
    finally:
        over.set()
        await saving


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)
