"""GGUF files for tests: random models, written with the `gguf` package in the way of llama.cpp's converter."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM

from rose.language_models.tiny import CHAT_TEMPLATE, build_tokenizer, shipped_texts

WIDTH, LAYERS, HEADS, KEY_HEADS = 64, 2, 4, 2
HEAD_WIDTHS = {"qwen2": WIDTH // HEADS, "phi3": WIDTH // HEADS, "qwen3": 128}
"""Where transformers' loader takes this one, whatever the file says; elsewhere it is `HEAD`."""
HEAD = 32
CONTEXT = 256
CONTROL, NORMAL = 3, 1
MODEL_TYPES = {"gemma3": "gemma3_text"}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}


@cache
def tokenizer() -> Any:
    return build_tokenizer(shipped_texts())


@dataclass
class Made:
    """What to write, to be changed by a test before `write`."""

    architecture: str
    model: Any
    kind: Kind = Kind.F32
    values: dict[str, Any] = field(default_factory=dict)
    """More values, or other ones; None leaves one out."""
    tensors: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    """More tensors."""
    chat_template: str | None = CHAT_TEMPLATE
    pre: str = "qwen2"

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in {**self._facts(), **self.values}.items():
            if value is not None:
                _add(writer, key, value)
        _add_tokenizer(writer, self.pre, self.chat_template)
        for name, numbers in {**self._tensors(), **self.tensors}.items():
            kind = self.kind if numbers.ndim == 2 and name in self._tensors() else Kind.F32
            if kind is Kind.F32:
                writer.add_tensor(name, numbers)
            else:
                writer.add_tensor(name, gguf.quantize(numbers, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _facts(self) -> dict[str, Any]:
        config, name = self.model.config, self.architecture
        head = HEAD_WIDTHS.get(name, HEAD)
        facts = {
            "context_length": CONTEXT,
            "embedding_length": WIDTH,
            "block_count": LAYERS,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KEY_HEADS,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.freq_base": 10_000.0,
            "rope.dimension_count": head,
            "attention.key_length": head,
            "attention.value_length": head,
        }
        if name.startswith("gemma"):
            facts["attention.sliding_window"] = 16
        if name == "gemma2":
            facts |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        return {f"{name}.{key}": value for key, value in facts.items()}

    def _tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        names = gguf.get_tensor_name_map(ARCHITECTURES[self.architecture], LAYERS)
        made: dict[str, np.ndarray[Any, Any]] = {}
        for name, weight in self.model.state_dict().items():
            if name == "lm_head.weight" and self.model.config.tie_word_embeddings:
                continue
            numbers = weight.numpy()
            if self.architecture.startswith("gemma") and name.endswith("norm.weight"):
                numbers = numbers + 1
            if self.architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
                numbers = _permuted(numbers, HEADS if ".q_proj." in name else KEY_HEADS)
            stem, _, kind = name.rpartition(".")
            found = names.get_name(stem)
            assert found is not None, name
            made[f"{found}.{kind}"] = np.ascontiguousarray(numbers)
        return made


def random_model(architecture: str, **changes: Any) -> Any:
    """Return an untrained model of transformers with numbers that differ everywhere, norms and biases included."""
    names = tokenizer()
    values: dict[str, Any] = {
        "vocab_size": len(names),
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": names.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": names.convert_tokens_to_ids("<|endoftext|>"),
    }
    if architecture != "phi3":  # its heads are as wide as the hidden size gives
        values["head_dim"] = HEAD_WIDTHS.get(architecture, HEAD)
    if architecture.startswith("gemma"):
        values |= {"sliding_window": 16, "query_pre_attn_scalar": HEAD}
    if architecture == "gemma3":
        values["rope_parameters"] = {
            "full_attention": values["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        }
    torch.manual_seed(0)
    config = AutoConfig.for_model(MODEL_TYPES.get(architecture, architecture), **{**values, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.2 + (0.5 if weight.ndim == 1 else 0.0))
    return model.eval()


def _permuted(numbers: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Order rows as llama.cpp's converter does (`LlamaModel.permute`)."""
    half = numbers.shape[0] // heads // 2
    return numbers.reshape(heads, 2, half, *numbers.shape[1:]).swapaxes(1, 2).reshape(numbers.shape)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, pre: str, chat_template: str | None) -> None:
    import json

    made = tokenizer()
    model = json.loads(made.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in made.all_special_tokens else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(made.convert_tokens_to_ids("<|im_end|>"))
    writer.add_pad_token_id(made.convert_tokens_to_ids("<|endoftext|>"))
    if chat_template is not None:
        writer.add_chat_template(chat_template)
