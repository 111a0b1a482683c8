"""What int8 weights cost in accuracy: the kernels' logits against transformers in float32, on passages of this
repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

PASSAGES, PASSAGE_TOKENS = 4, 256


class Direct:
    """The quantised model without an engine around it."""

    def __init__(self, model: Path, weights: str, kv_dtype: str) -> None:
        import torch
        from safetensors import safe_open
        from transformers import AutoConfig

        from sagellm_common.engines.lmdeploy.device_cpu import install

        install()
        from sagellm_common.engines.lmdeploy.kernels.model import Int8CausalLM, Int8x2CausalLM

        self.torch = torch
        config = AutoConfig.from_pretrained(model)
        self.model = {"int8": Int8CausalLM, "int8x2": Int8x2CausalLM}[weights](config, None)
        for file in sorted(model.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                self.model.load_weights((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118
        self.model.update_weights()
        layers, shape = config.num_hidden_layers, self.model.shape
        pool = torch.zeros(640, 2, layers, 16, shape.kv_heads, shape.head_dim, dtype=getattr(torch, kv_dtype))
        self.caches = [(pool[:, 0, i], pool[:, 1, i]) for i in range(layers)]

    def step(self, ids: list[list[int]], known: int) -> Any:
        """Logits [tokens, vocabulary] of each sequence's new tokens, the first of which stands at position `known`."""
        from types import SimpleNamespace

        from sagellm_common.engines.lmdeploy.kernels.ops import Batch

        torch, count, length = self.torch, len(ids), len(ids[0])
        width = -(-(known + length) // 16)
        batch = Batch.of(
            torch.full((count,), length),
            torch.full((count,), known + length),
            torch.arange(count * width).view(count, width),
        )
        tokens = torch.tensor([token for sequence in ids for token in sequence])[None]
        hidden = self.model.forward(tokens, None, self.caches, SimpleNamespace(batch=batch))
        return self.model.get_logits(hidden)[0]

    @property
    def weight_bytes(self) -> int:
        """What a decode step reads of them: all layers and the head."""
        linears = [*self.model._linears.values(), self.model._head]
        return sum(linear.size_bytes for linear in linears if linear is not None)


def passages(model: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    text = "\n".join(Path(name).read_text() for name in ("README.md", "CHANGELOG.md"))
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    return [ids[i * PASSAGE_TOKENS : (i + 1) * PASSAGE_TOKENS] for i in range(PASSAGES)]


def accuracy(model: Path, kv_dtypes: dict[str, str]) -> dict[str, dict[str, float]]:
    """KL divergence from float32 (nats, mean and largest), agreement of the best token, perplexity; weight bytes.

    `kv_dtypes`: of each engine.weights to be judged.
    """
    import torch
    from transformers import AutoModelForCausalLM

    texts = passages(model)
    with torch.inference_mode():
        oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        exact = [oracle(torch.tensor([text])).logits[0].log_softmax(-1) for text in texts]
        del oracle

        def judge(found: list[torch.Tensor]) -> dict[str, float]:
            kl = torch.cat([(e.exp() * (e - f)).sum(-1) for e, f in zip(exact, found, strict=True)])
            same = torch.cat([e.argmax(-1) == f.argmax(-1) for e, f in zip(exact, found, strict=True)])
            loss = torch.cat(
                [-f[:-1].gather(1, torch.tensor(t[1:])[:, None]) for f, t in zip(found, texts, strict=True)]
            )
            return {
                "kl_mean": float(kl.mean()),
                "kl_max": float(kl.max()),
                "argmax_agreement": float(same.float().mean()),
                "perplexity": float(loss.mean().exp()),
                "positions": float(len(kl)),
            }

        result = {"float32": judge(exact)}
        for weights, kv_dtype in kv_dtypes.items():
            direct = Direct(model, weights, kv_dtype)
            result[weights] = judge([direct.step([text], 0).log_softmax(-1) for text in texts])
            result[weights]["weight_bytes"] = float(direct.weight_bytes)
        return result
