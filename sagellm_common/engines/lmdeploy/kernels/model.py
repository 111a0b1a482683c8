"""Llama and Qwen2 for LMDeploy with int8 weights: one call of the kernels computes all layers of a step.

LMDeploy builds the class that `architecture(weights)` names (its module map knows it through `register`), feeds it the
checkpoint's tensors and asks it for hidden states and logits, as it does with its own models. Layers are quantised as
soon as their last tensor has arrived, so a checkpoint is never in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lmdeploy.pytorch.models.module_map import MODULE_MAP
from lmdeploy.pytorch.models.utils.cudagraph import CudaGraphMixin
from lmdeploy.pytorch.nn import build_rotary_embedding_from_config
from torch import Tensor, nn

from sagellm_common.core.errors import ConfigError
from sagellm_common.engines.lmdeploy.kernels.native import native_ops
from sagellm_common.engines.lmdeploy.kernels.ops import (
    Batch,
    CpuOps,
    Decoder,
    DecoderLayer,
    DecoderShape,
    KvLayer,
    LayerDone,
    Linear,
    Planes,
)
from sagellm_common.engines.lmdeploy.kernels.reference import ReferenceOps
from sagellm_common.engines.lmdeploy.progress import listener

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
DYNAMIC_ROPE = frozenset({"dynamic", "longrope", "su", "fope"})

LAYER_TENSORS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The kernels' linear layers, and the checkpoint's that are stacked into them."""
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def architecture(weights: str, architectures: list[str]) -> str:
    """The name LMDeploy is to look for instead of the checkpoint's. Raises ConfigError for another kind of model."""
    if not set(architectures) & set(FAMILIES):
        raise ConfigError(
            f"engine.weights: {weights!r} serves {' and '.join(FAMILIES)}, not {', '.join(architectures)}; use 'dtype'"
        )
    model: type[QuantizedCausalLM] = {"int8": Int8CausalLM, "int8x2": Int8x2CausalLM}[weights]
    return str(model.__name__)


def register() -> None:
    """Makes the classes below known to LMDeploy. Idempotent."""
    MODULE_MAP.update({kind.__name__: f"{kind.__module__}.{kind.__name__}" for kind in (Int8CausalLM, Int8x2CausalLM)})


def kernel_ops() -> CpuOps:
    """The compiled kernels, or torch."""
    return native_ops() or ReferenceOps()


class QuantizedCausalLM(nn.Module, CudaGraphMixin):  # the mixin: what LMDeploy asks of every model
    planes: ClassVar[Planes]

    def __init__(self, config: Any, ctx_mgr: Any, dtype: torch.dtype | None = None, device: Any = None) -> None:
        super().__init__()
        self.config, self.ctx_mgr = config, ctx_mgr
        scaling = getattr(config, "rope_scaling", None) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind in DYNAMIC_ROPE:
            raise ConfigError(f"engine.weights: rotary embeddings of type {kind!r} need engine.weights 'dtype'")
        heads = config.num_attention_heads
        self.shape = DecoderShape(
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate=config.intermediate_size,
            norm_eps=config.rms_norm_eps,
            planes=self.planes,
        )
        problem = self.shape.problem()
        if problem:
            raise ConfigError(f"engine.weights: {problem}; use engine.weights 'dtype' for this model")
        self.ops = kernel_ops()
        self._pending: dict[str, Tensor] = {}
        self._linears: dict[str, Linear] = {}
        self._decoder: Decoder | None = None
        self._embedding: Tensor | None = None
        self._head: Linear | None = None

    # ---- loading ----

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """May be called once per file of a checkpoint."""
        for name, tensor in weights:
            if "rotary_emb" not in name:
                self._pending[name] = tensor
                self._quantize_complete(name)

    def _quantize_complete(self, name: str) -> None:
        """The linear layer that `name` is a part of, once all its parts are there."""
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        for target, sources in LAYER_TENSORS.items():
            if not any(part.startswith(f"{source}.") for source in sources):
                continue
            prefix = f"model.layers.{layer}"
            wanted = [f"{prefix}.{source}.weight" for source in sources]
            if self._has_bias(target):
                wanted += [f"{prefix}.{source}.bias" for source in sources]
            if all(tensor in self._pending for tensor in wanted):
                parts = [self._pending.pop(tensor) for tensor in wanted]
                weight = torch.cat([t.float() for t in parts[: len(sources)]])
                bias = torch.cat([t.float() for t in parts[len(sources) :]]) if len(parts) > len(sources) else None
                self._linears[f"{layer}.{target}"] = self.ops.linear(weight, bias, self.planes)

    def _has_bias(self, target: str) -> bool:
        if self.config.model_type == "qwen2":
            return target == "qkv"
        attention = target in ("qkv", "output")
        return bool(getattr(self.config, "attention_bias" if attention else "mlp_bias", False))

    def update_weights(self) -> None:
        """LMDeploy calls it when everything was loaded."""
        layers = range(self.config.num_hidden_layers)
        missing = [
            name for name in (f"{i}.{target}" for i in layers for target in LAYER_TENSORS) if name not in self._linears
        ]
        if missing:
            raise ConfigError(f"model.path: the checkpoint lacks parts of layers {', '.join(missing[:5])}")
        self._embedding = self._pending.pop("model.embed_tokens.weight")
        head = self._embedding if self.config.tie_word_embeddings else self._pending.pop("lm_head.weight")
        self._head = self.ops.linear(head, None, self.planes)
        cosines, sines = self._rotary_tables()
        self._decoder = self.ops.decoder(
            self.shape,
            [
                DecoderLayer(
                    *(self._norm(f"model.layers.{i}.{NORMS[0]}"), self._linears[f"{i}.qkv"]),
                    *(self._linears[f"{i}.output"], self._norm(f"model.layers.{i}.{NORMS[1]}")),
                    *(self._linears[f"{i}.gate_up"], self._linears[f"{i}.down"]),
                )
                for i in layers
            ],
            self._norm("model.norm.weight"),
            cosines,
            sines,
        )
        self._pending.clear()

    def _norm(self, name: str) -> Tensor:
        return self._pending.pop(name).float().contiguous()

    def _rotary_tables(self) -> tuple[Tensor, Tensor]:
        """[positions, head_dim / 2], from LMDeploy's own rotary embedding; its second half repeats the first."""
        half = self.shape.head_dim // 2
        positions = torch.arange(self.config.max_position_embeddings)[None]
        tables = build_rotary_embedding_from_config(self.config)(torch.empty(0), positions)
        cosines, sines = (table[0, :, :half].float().contiguous() for table in tables)
        return cosines, sines

    # ---- a step ----

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        past_key_values: list[Any],
        attn_metadata: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """input_ids [1, T] → hidden states [1, T, hidden] float32."""
        follower = listener(past_key_values[0][0])
        return self.hidden_states(input_ids[0], past_key_values, attn_metadata.batch, follower, inputs_embeds)

    def hidden_states(
        self,
        ids: Tensor,
        caches: Sequence[KvLayer],
        batch: Batch,
        layer_done: LayerDone | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """ids [T] → [1, T, hidden] float32; writes KV of these tokens to the caches."""
        assert self._decoder is not None and self._embedding is not None, "the weights were not loaded"
        embedded = F.embedding(ids, self._embedding) if inputs_embeds is None else inputs_embeds[0]
        hidden = embedded.to(torch.float32, copy=inputs_embeds is not None)
        return self._decoder(hidden, caches, batch, layer_done)[None]

    def get_logits(self, hidden_states: Tensor) -> Tensor:
        """[1, rows, hidden] → [1, rows, vocabulary] float32."""
        assert self._head is not None, "the weights were not loaded"
        return self._head(hidden_states[0])[None]

    def get_input_embeddings(self) -> Any:
        """A function from ids to embeddings, as LMDeploy uses it."""
        assert self._embedding is not None, "the weights were not loaded"
        table = self._embedding
        return lambda ids: F.embedding(ids, table)

    def prepare_inputs_for_generation(
        self, past_key_values: list[Any], inputs_embeds: Tensor | None = None, context: Any = None
    ) -> dict[str, Any]:
        return {
            "input_ids": context.input_ids,
            "position_ids": context.position_ids,
            "past_key_values": past_key_values,
            "attn_metadata": context.attn_metadata,
            "inputs_embeds": inputs_embeds,
        }


class Int8CausalLM(QuantizedCausalLM):
    planes: ClassVar[Planes] = 1


class Int8x2CausalLM(QuantizedCausalLM):
    planes: ClassVar[Planes] = 2
