"""Models and adapters that servers are measured on, made once in a folder of the user's cache."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import msgspec
import platformdirs
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.qwen2 import Qwen2Config

from benchmarks.quality import bases
from rose.blobs import Blobs
from rose.domain.artifacts import Artifact
from rose.domain.hyperparameters import LoraSettings
from rose.domain.job_values import BaseModel
from rose.language_models.load import load_model
from rose.language_models.locate import describe
from rose.language_models.lora import attach
from rose.language_models.template import load_template
from rose.language_models.tiny import build_fixture

RANK = 16
ADAPTER_STD = {"fixture": 0.1}
"""Standard deviation of an adapter's B. Others take ADAPTER_STD_LARGE: it changes answers and leaves them text."""
ADAPTER_STD_LARGE = 0.01
QWEN_SHAPE: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 8192,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
"""Of Qwen2.5-0.5B."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MODELS = ("smollm2", "qwen", "fixture")


class World(msgspec.Struct, frozen=True, kw_only=True):
    """A base and adapters of it on disk."""

    name: str
    folder: Path
    base: BaseModel
    blobs: Path
    adapters: list[Artifact]
    end_tokens: list[int]
    """Ids that end an answer; biased away, they make every answer as long as it may be."""

    def adapter_folder(self, adapter: Artifact) -> Path:
        """Return where an adapter lies, in PEFT's format."""
        return self.blobs / adapter.path

    def tokenizer(self) -> Tokenizer:
        """Return the base's tokenizer."""
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))


def build(name: str, adapters: int, where: Path | None = None) -> World:
    """Make sure that the model and so many adapters lie in `where` (default: the user's cache)."""
    root = where or platformdirs.user_cache_path("rose-benchmarks") / "serving"
    folder = _model(name, root)
    base = describe(folder, source=str(folder), revision=None).base_model()
    blobs = Blobs(root / f"{name}-blobs")
    return World(
        name=name,
        folder=folder,
        base=base,
        blobs=blobs.root,
        adapters=_adapters(name, folder, blobs, base, adapters),
        end_tokens=sorted(load_template(folder).stop_ids),
    )


def _model(name: str, root: Path) -> Path:
    if name == "smollm2":
        return bases() / "smollm2"
    folder = root / name
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        (build_fixture if name == "fixture" else _build_qwen)(folder)
        (folder / "done").touch()
    return folder


def _build_qwen(folder: Path) -> Path:
    """Write random weights of Qwen2.5-0.5B's shape with SmolLM2's tokenizer.

    Rows of the embedding that no token has are zero: the largest of 49,152 random logits is above zero, so that an
    answer has only tokens that the tokenizer knows, while the head costs as much as that of the real model.
    """
    small = bases() / "smollm2"
    known = Tokenizer.from_file(str(small / "tokenizer.json")).get_vocab_size()
    end = load_template(small).tokenizer.eos_token_id
    torch.manual_seed(0)
    config = Qwen2Config(**QWEN_SHAPE, bos_token_id=None, eos_token_id=end, pad_token_id=end)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[known:] = 0
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(small / file, folder / file)
    return folder


def _adapters(name: str, folder: Path, blobs: Blobs, base: BaseModel, count: int) -> list[Artifact]:
    """Return the first adapters of the model; those that are missing are made, each other than all before it."""
    std = ADAPTER_STD.get(name, ADAPTER_STD_LARGE)
    listed = blobs.root / f"adapters-{base.fingerprint[:16]}-{std}.json"
    found = msgspec.json.decode(listed.read_bytes(), type=list[Artifact]) if listed.exists() else []
    if len(found) < count:
        found += make_adapters(folder, blobs, base, range(len(found), count), std)
        listed.write_bytes(msgspec.json.encode(found))
    return found[:count]


def make_adapters(folder: Path, blobs: Blobs, base: BaseModel, seeds: range, std: float) -> list[Artifact]:
    """Publish adapters on all linear layers that were never trained but change what the model says."""
    lora = LoraSettings(r=RANK, lora_alpha=2.0 * RANK, lora_dropout=0.0, target_modules=("all-linear",))
    adapter = attach(load_model(folder), lora, 0)
    made: list[Artifact] = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in adapter.layers.values():
                layer.lora_a.normal_(0, layer.lora_a.shape[1] ** -0.5, generator=generator)
                layer.lora_b.normal_(0, std, generator=generator)
        temporary = blobs.temporary_folder()
        adapter.save(temporary, base)
        made.append(blobs.publish_folder(temporary, f"jobs/ftjob_{base.fingerprint[:8]}_{std}_{seed}/e1/model"))
    return made


TOPICS = (
    *("roses", "tides", "bridges", "bread", "glaciers", "violins", "honey bees", "compasses", "lighthouses", "tea"),
    *("volcanoes", "paper", "sundials", "rivers", "clocks", "orchards", "kites", "salt", "maps", "owls"),
)
ASKED = (
    *("Tell me about", "What should a child know about", "Write a short story about", "What is the history of"),
    *("Why do people care for", "Give me three facts about", "How would you explain", "What is surprising about"),
)


def question(number: int) -> str:
    """Return a question that is unlike those of other numbers from its first words on."""
    topic, asked = TOPICS[number % len(TOPICS)], ASKED[number // len(TOPICS) % len(ASKED)]
    return f"Question {number}. {asked} {topic}?"


def passage(tokenizer: Tokenizer, tokens: int, number: int) -> str:
    """Return a text of so many tokens, unlike that of other numbers from its first words on."""
    words = (
        f"Rule {number}.{line}: when somebody speaks of {TOPICS[line % 20]}, be brief." for line in itertools.count()
    )
    text = next(words)
    while len(ids := tokenizer.encode(text, add_special_tokens=False).ids) < tokens:
        text = " ".join((text, *itertools.islice(words, 10)))
    return tokenizer.decode(ids[:tokens])
