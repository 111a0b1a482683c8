from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.bpe import write_tokenizer
from tests.support.scripted_router import Script, ScriptedRouter, model_info, scripted_router


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
async def router(tokenizer_dir: Path) -> AsyncIterator[ScriptedRouter]:
    async with scripted_router(Script(models=[model_info(str(tokenizer_dir))])) as router:
        yield router
