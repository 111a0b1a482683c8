"""Model shapes, and checkpoints of them with random weights: what is right and fast does not depend on the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's matrices."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        return heads + 3 * self.hidden_size * self.intermediate_size

    @property
    def parameters(self) -> int:
        """All of them but the norms."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.num_layers * self.layer_parameters + embeddings

    def prefill_flops(self, prompt_tokens: int) -> float:
        """Floating-point operations that a prompt needs at least, logits of its last token included.

        2 per weight and token, and 4·H·D per layer and pair of tokens that attention looks at: the forward third of
        PaLM's 6N + 12·L·H·Q·T per token (Chowdhery et al. 2022, appendix B), half of the pairs being masked.
        """
        matrices = 2.0 * self.num_layers * self.layer_parameters * prompt_tokens
        pairs = prompt_tokens * (prompt_tokens + 1) / 2
        attention = 4.0 * self.num_layers * self.num_heads * self.head_dim * pairs
        return matrices + attention + 2.0 * self.hidden_size * self.vocab_size

    def config(self, dtype: str, context_length_tokens: int) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": context_length_tokens,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "torch_dtype": dtype,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 128, 2, 4, 2, 16, 512, tied=True),
        Shape("1B", 2048, 8192, 16, 32, 8, 64, 128_256, tied=True),  # as Llama 3.2 1B
        Shape("8B", 4096, 14_336, 32, 32, 8, 128, 128_256, tied=False),  # as Llama 3.1 8B
    )
}


def write_checkpoint(shape: Shape, target: Path, device: str, dtype: str, context_length_tokens: int) -> Path:
    """A Hugging Face checkpoint with weights drawn on `device`, one file per layer, and a byte-level tokenizer.

    Each matrix keeps the size of what it is applied to (variance 1 / columns), so that attention is neither flat nor
    one-hot and logits are about as far apart as a trained model's.
    """
    import torch
    from safetensors.torch import save_file

    from services.cli.models import prepare_tiny

    target.mkdir(parents=True)
    tokenizer = prepare_tiny("llama", target.parent / "tokenizer")  # LMDeploy wants one; 259 of the ids mean something
    for file in tokenizer.iterdir():
        if "token" in file.name:
            (target / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator(device).manual_seed(0)
    wanted = getattr(torch, dtype)
    index: dict[str, str] = {}

    def matrix(rows: int, columns: int, deviation: float | None = None) -> Any:
        values = torch.empty(rows, columns, dtype=wanted, device=device)
        return values.normal_(0, deviation or columns**-0.5, generator=generator).cpu()

    def norm() -> Any:
        return torch.ones(shape.hidden_size, dtype=wanted)

    def save(name: str, tensors: dict[str, Any]) -> None:
        save_file(tensors, target / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    hidden, heads, kv_heads = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    for layer in range(shape.num_layers):
        at = f"model.layers.{layer}"
        tensors = {
            f"{at}.self_attn.q_proj.weight": matrix(heads, hidden),
            f"{at}.self_attn.k_proj.weight": matrix(kv_heads, hidden),
            f"{at}.self_attn.v_proj.weight": matrix(kv_heads, hidden),
            f"{at}.self_attn.o_proj.weight": matrix(hidden, heads),
            f"{at}.mlp.gate_proj.weight": matrix(shape.intermediate_size, hidden),
            f"{at}.mlp.up_proj.weight": matrix(shape.intermediate_size, hidden),
            f"{at}.mlp.down_proj.weight": matrix(hidden, shape.intermediate_size),
            f"{at}.input_layernorm.weight": norm(),
            f"{at}.post_attention_layernorm.weight": norm(),
        }
        save(f"layer-{layer:03}.safetensors", tensors)
    # A tied matrix is both: its rows are what the norm makes unit-sized anyway.
    ends = {"model.embed_tokens.weight": matrix(shape.vocab_size, hidden, hidden**-0.5), "model.norm.weight": norm()}
    if not shape.tied:
        ends["lm_head.weight"] = matrix(shape.vocab_size, hidden)
    save("ends.safetensors", ends)
    total = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    (target / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (target / "config.json").write_text(json.dumps(shape.config(dtype, context_length_tokens), indent=1))
    return target
