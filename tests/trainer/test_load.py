"""A model is loaded completely or refused with the reason; never partly, filled up with random numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.gemma2 import Gemma2Config, Gemma2ForCausalLM
from transformers.models.mamba import MambaConfig, MambaForCausalLM

from rose.errors import InvalidRequest
from rose.language_models.load import load_model

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(fixture_base: Path, tmp_path: Path) -> Path:
    """A copy of the fixture that a test may damage."""
    return Path(shutil.copytree(fixture_base, tmp_path / "model"))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: change_weights(folder, lambda w: w.pop(UP)), f"1 of its weights are not in .* first {UP}"),
        (lambda folder: change_weights(folder, lambda w: w.update({UP: torch.zeros(3)})), f"another shape .* {UP}"),
        (lambda folder: change_config(folder, tie_word_embeddings=False), "first lm_head.weight"),
        (lambda folder: change_config(folder, model_type="bert"), "not in its files"),
        (lambda folder: change_config(folder, model_type="t5"), "Unrecognized configuration class"),
        (lambda folder: change_config(folder, hidden_size="many"), "expected int, got str"),
        (lambda folder: change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}), "GPTQ"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"{}"), "cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_whole_is_refused_with_the_reason(
    folder: Path, damage: Callable[[Path], Any], says: str
) -> None:
    damage(folder)
    with pytest.raises(InvalidRequest, match=says) as caught:
        load_model(folder)
    assert caught.value.code == "model_not_available"


def test_a_model_that_caps_its_scores_keeps_its_own_attention(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.config._attn_implementation == "eager"
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_cannot_be_asked_token_by_token_is_refused(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match="keeps no keys and values"):
        load_model(tmp_path)
