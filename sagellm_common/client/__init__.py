"""The public SDK: `AsyncClient` and `Client`."""

from sagellm_common.client.aio import AsyncClient, Completion, Options, Prompt
from sagellm_common.client.generation import TextOutput
from sagellm_common.client.sync import Client

__all__ = ["AsyncClient", "Client", "Completion", "Options", "Prompt", "TextOutput"]
