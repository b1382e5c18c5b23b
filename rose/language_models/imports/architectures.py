"""What each architecture of GGUF is in transformers: its configuration, the names of its weights, what is undone.

llama.cpp's converter renames every weight, stores the norms of Gemma with 1 added, and reorders the rows of query and
key of `llama`, whose rotary embedding pairs neighbours where transformers' pairs halves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from rose.language_models.imports.gguf_file import GgufFile, NotImportable

Config = dict[str, Any]

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What llama.cpp's converter takes for Llama 3.1 and later; it writes only the factors that follow from it."""

_DENSE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PHI3 = {**_DENSE, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_GEMMA = {
    **_DENSE,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\Z")
DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that follow from the configuration; transformers computes them."""


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """How one architecture is read."""

    config: Callable[[GgufFile], Config]
    names: dict[str, str]
    permuted: bool = False
    """Rows of query and key are reordered."""
    norm_plus_one: bool = False
    """Norms are stored with 1 added."""

    def target(self, tensor: str) -> str | None:
        """Return transformers' name of a tensor, for example of `blk.3.attn_q.weight`; None where it has none."""
        stem, _, kind = tensor.rpartition(".")
        block = BLOCK.match(stem)
        leaf = block[2] if block else stem
        if leaf not in self.names:
            return None
        return f"model.layers.{block[1]}.{self.names[leaf]}.{kind}" if block else f"{self.names[leaf]}.{kind}"


def architecture_of(file: GgufFile) -> Architecture:
    """Return how this file is read. Raises: NotImportable naming those that can be."""
    if file.of_model("expert_count", 0):
        raise NotImportable(
            f"{file.path.name} is a mixture of experts ({file.architecture}, {file.of_model('expert_count')} experts); "
            "ROSE imports dense models from GGUF.",
            hint="Import the folder with its original *.safetensors: rose models import FOLDER",
        )
    found = ARCHITECTURES.get(file.architecture)
    if found is None:
        raise NotImportable(
            f"{file.path.name} has the architecture {file.architecture!r}; ROSE imports {', '.join(ARCHITECTURES)}.",
            hint="Import the folder with its original *.safetensors: rose models import FOLDER",
        )
    return found


def _dense(file: GgufFile, model_type: str) -> Config:
    heads = int(file.required("attention.head_count"))
    width = int(file.required("embedding_length"))
    return {
        "model_type": model_type,
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in file.tensors else 0,
        "hidden_size": width,
        "intermediate_size": int(file.required("feed_forward_length")),
        "num_hidden_layers": int(file.required("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(file.of_model("attention.head_count_kv", heads)),
        "head_dim": int(file.of_model("attention.key_length") or width // heads),
        "max_position_embeddings": int(file.required("context_length")),
        "rms_norm_eps": _plain(file.required("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(file),
        # llama.cpp writes an output projection only where it is not the embedding.
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.value("tokenizer.ggml.padding_token_id"),
    }


def _llama(file: GgufFile) -> Config:
    window = file.of_model("attention.sliding_window")
    config = _dense(file, "mistral" if window else "llama")
    if window:
        return {**config, "sliding_window": int(window)}
    return {**config, "attention_bias": "blk.0.attn_q.bias" in file.tensors}


def _qwen2(file: GgufFile) -> Config:
    return _dense(file, "qwen2")


def _qwen3(file: GgufFile) -> Config:
    return {**_dense(file, "qwen3"), "attention_bias": "blk.0.attn_q.bias" in file.tensors}


def _gemma2(file: GgufFile) -> Config:
    config = _dense(file, "gemma2")
    # The 27B divides by the width of a head as the hidden size gives it, the others by the head's own.
    wide = config["num_hidden_layers"] == 46
    return {
        **config,
        "sliding_window": int(file.of_model("attention.sliding_window", 4096)),
        "attn_logit_softcapping": _plain(file.of_model("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": _plain(file.of_model("final_logit_softcapping", 30.0)),
        "query_pre_attn_scalar": _scalar(config, wide=wide),
    }


def _gemma3(file: GgufFile) -> Config:
    config = _dense(file, "gemma3_text")
    softcap = file.of_model("final_logit_softcapping")
    local = file.of_model("rope.freq_base_swa", 10_000.0)
    return {
        **config,
        "sliding_window": int(file.of_model("attention.sliding_window", 1024)),
        "final_logit_softcapping": None if softcap is None else _plain(softcap),
        "query_pre_attn_scalar": _scalar(config, wide=config["num_hidden_layers"] == 62),
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": _plain(local)},
        },
    }


def _phi3(file: GgufFile) -> Config:
    config = _dense(file, "phi3")
    head = config.pop("head_dim")
    rope = {**config["rope_parameters"]}
    rope["partial_rotary_factor"] = int(file.of_model("rope.dimension_count") or head) / head
    window = file.of_model("attention.sliding_window")
    original = int(file.of_model("rope.scaling.original_context_length") or config["max_position_embeddings"])
    if "rope_factors_long.weight" in file.tensors:
        for kind in ("long", "short"):
            factors = file.tensors[f"rope_factors_{kind}.weight"].data
            rope[f"{kind}_factor"] = [_plain(number) for number in factors]
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": original}
    return {
        **config,
        "rope_parameters": rope,
        "original_max_position_embeddings": original,
        "sliding_window": int(window) if window else None,
    }


def _scalar(config: Config, *, wide: bool) -> int:
    return int(config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"])


def _rope(file: GgufFile) -> Config:
    """Return the rotary embedding's parameters. Raises: NotImportable for a scaling that is not known here."""
    rope: Config = {"rope_type": "default", "rope_theta": _plain(file.of_model("rope.freq_base", 10_000.0))}
    kind = file.of_model("rope.scaling.type", "none")
    factor = file.of_model("rope.scaling.factor")
    original = file.of_model("rope.scaling.original_context_length")
    if "rope_freqs.weight" in file.tensors:
        return rope | _llama3_rope(file, float(rope["rope_theta"]))
    if kind == "linear" and factor:
        return rope | {"rope_type": "linear", "factor": _plain(factor)}
    if kind == "yarn" and factor and original:
        return rope | {
            "rope_type": "yarn",
            "factor": _plain(factor),
            "original_max_position_embeddings": int(original),
        }
    if kind in ("none", "") or file.architecture == "phi3":
        return rope
    raise NotImportable(
        f"{file.path.name} scales its rotary embedding in a way that ROSE does not read ({kind}).",
        hint="Import the folder with its original *.safetensors: rose models import FOLDER",
    )


def _llama3_rope(file: GgufFile, theta: float) -> Config:
    """Return the parameters behind the factors in the file, after computing the factors from them again."""
    factors = [float(number) for number in file.tensors["rope_freqs.weight"].data.reshape(-1)]
    found: Config = {"rope_type": "llama3", "factor": _plain(max(factors)), **LLAMA3_ROPE}
    again = [_llama3_factor(index, len(factors), theta, found) for index in range(len(factors))]
    if any(abs(one - other) > 1e-3 * other for one, other in zip(factors, again, strict=True)):
        raise NotImportable(
            f"{file.path.name} scales its rotary embedding by factors that are not those of Llama 3.",
            hint="Import the folder with its original *.safetensors: rose models import FOLDER",
        )
    return found


def _llama3_factor(index: int, count: int, theta: float, rope: Config) -> float:
    length = 2 * math.pi * theta ** (index / count)
    original, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    if length < original / high:
        return 1.0
    if length > original / low:
        return float(rope["factor"])
    smooth = (original / length - low) / (high - low)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def _plain(number: Any) -> float:
    """Return the shortest number that is the same float32: the file says 9.999999747378752e-06 for 1e-05."""
    return float(str(np.float32(number)))


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(config=_llama, names=_DENSE, permuted=True),
    "qwen2": Architecture(config=_qwen2, names=_DENSE),
    "qwen3": Architecture(config=_qwen3, names=_DENSE),
    "gemma2": Architecture(config=_gemma2, names=_GEMMA, norm_plus_one=True),
    "gemma3": Architecture(config=_gemma3, names=_GEMMA, norm_plus_one=True),
    "phi3": Architecture(config=_phi3, names=_PHI3),
}
"""`llama` is also the architecture of Mistral, SmolLM and TinyLlama."""
