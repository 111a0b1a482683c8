from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from sagellm_common.client.text import Tokenizer
from tests.support.bpe import write_tokenizer
from tests.support.gateway import serve_gateway
from tests.support.scripted_router import Script, ScriptedRouter, model_info, scripted_router

ANSWER = "héllo 你好 🙂 END of it"


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(tokenizer_dir)


@pytest.fixture
async def router(tokenizer_dir: Path, tokenizer: Tokenizer) -> AsyncIterator[ScriptedRouter]:
    script = Script(reply=tokenizer.encode(ANSWER).tolist(), models=[model_info(str(tokenizer_dir))])
    async with scripted_router(script) as router:
        yield router


@pytest.fixture
async def http(router: ScriptedRouter) -> AsyncIterator[httpx.AsyncClient]:
    """A plain HTTP client of a gateway with default settings."""
    async with serve_gateway(router.address) as url, httpx.AsyncClient(base_url=url, timeout=10) as client:
        yield client
