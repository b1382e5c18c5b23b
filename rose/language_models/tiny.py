"""Small models that ROSE builds itself, so that tests and a first run need no download.

`build_fixture` makes a random one in under a second for tests; `build_tiny` makes the demo base `tiny`, pretrained for
about a minute on the text and the lessons that ship with the project. Both are toys: they learn the form of an answer
and know nothing. Both are deterministic: same version, architecture and seed, same bytes.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama import LlamaConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config
from transformers.utils import logging as transformers_logging

from rose.language_models.lessons import lessons
from rose.language_models.locate import (
    FACTS_FILE,
    TINY,
    TINY_VERSION,
    RoseFacts,
    built_version,
    is_built,
    outdated_folder,
)
from rose.language_models.pretraining import STEPS, pretrain

Architecture = Literal["qwen3", "qwen2", "llama"]

VOCABULARY = 1024
CONTEXT_TOKENS = 2048
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
"""Qwen2's tokenizer class adds this token where it is missing, behind the end of the embedding."""
_SPECIAL_TOKENS = ("<|im_start|>", END_OF_TURN, PADDING)

FIXTURE_GAIN = 8.0
"""Weight of the final norm. RMS-normalised states times tied embeddings of std 0.02 bound the logits near 2.5, so that
adapters on inner layers cannot make the model sure of anything; the gain lifts the bound (measured in
docs/base-models.md, "Models that ROSE builds")."""

PRETRAINED_GAIN = 4.0
"""Where the pretrained model's final norm starts; it trains well from there, and adapters have room (there, too)."""
PRETRAINING_SEED = 1

FIXTURE_LEARNING_RATE = 3e-3
"""For LoRA r16 on a random model: docs/workflow.md's two answers are learned by heart in 50 steps of one example with
1.5e-3 to 4e-3 (four seeds each); 1e-2 diverges at that batch size."""
TINY_LEARNING_RATE = 4e-3
"""The same for the pretrained one: 2e-3 to 7e-3 (four seeds each)."""

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson)
                + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def shipped_texts() -> list[str]:
    """Return the English texts that ship with ROSE, in the order of their names."""
    folder = resources.files("rose.language_models") / "data"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".txt"))
    return [(folder / name).read_text(encoding="utf-8") for name in names]


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of VOCABULARY tokens with a ChatML template; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        additional_special_tokens=["<|im_start|>"],
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def random_model(tokenizer: PreTrainedTokenizerFast, architecture: Architecture, *, seed: int, gain: float) -> Any:
    """Return an untrained model of width 128 with 4 layers (0.92 million parameters), final norm weight `gain`."""
    kinds: dict[str, Any] = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}
    config = kinds[architecture](
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        pad_token_id=tokenizer.convert_tokens_to_ids(PADDING),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(gain)
    return model


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, facts: RoseFacts) -> None:
    """Write a complete model folder as transformers reads it, with ROSE's facts last."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / FACTS_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(facts)))


def build_fixture(folder: Path, architecture: Architecture = "qwen3", seed: int = 0) -> Path:
    """Write a random model for tests into `folder` and return it; takes well under a second.

    Its tokens are real, its answers are noise, and adapters of rank 16 learn a handful of answers by heart in seconds.
    """
    tokenizer = build_tokenizer(shipped_texts())
    model = random_model(tokenizer, architecture, seed=seed, gain=FIXTURE_GAIN)
    facts = RoseFacts(
        name=f"fixture-{architecture}",
        version=str(seed),
        about="Random weights, for tests.",
        rose_base_learning_rate=FIXTURE_LEARNING_RATE,
    )
    save(model, tokenizer, folder, facts)
    return folder


def build_tiny(folder: Path, *, steps: int | None = None, report: Callable[[str], None] = print) -> Path:
    """Make sure that the model `tiny` of this version lies in `folder`, and return it; takes about a minute once.

    Several processes may ask at once: one builds, the others wait for it. The folder appears complete or not at all;
    a model of an older version is moved aside.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_builder(folder, report):
        if is_built(folder):
            report(f"{TINY} is already in {folder}")
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            built = Path(temporary) / folder.name
            _pretrained(built, steps=steps, report=report)
            _move_aside(folder)
            built.rename(folder)
    report(f"{TINY} is in {folder}")
    return folder


def _pretrained(folder: Path, *, steps: int | None, report: Callable[[str], None]) -> None:
    texts = shipped_texts()
    samples = ["\n".join(turn) for turn in islice(lessons(PRETRAINING_SEED), 2000)]
    tokenizer = build_tokenizer([*texts, *samples])
    model = random_model(tokenizer, "qwen3", seed=PRETRAINING_SEED, gain=PRETRAINED_GAIN)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on the number of threads, and a busy neighbour makes two slower than one
    try:
        pretrain(model, tokenizer, texts, seed=PRETRAINING_SEED, steps=steps or STEPS, report=report)
    finally:
        torch.set_num_threads(threads)
    facts = RoseFacts(
        name=TINY,
        version=TINY_VERSION,
        about="A toy: a million numbers, trained for a minute. It learns the form of answers and knows nothing.",
        rose_base_learning_rate=TINY_LEARNING_RATE,
    )
    save(model, tokenizer, folder, facts)


@contextmanager
def _only_builder(folder: Path, report: Callable[[str], None]) -> Generator[None]:
    """Hold the lock of this folder; the system releases it when its holder dies."""
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"another process is building {folder}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _move_aside(folder: Path) -> None:
    """Keep a model of an older version for its adapters; clear away what is no complete model."""
    if not folder.exists():
        return
    kept = outdated_folder(folder, built_version(folder) or "broken")
    if kept.exists():
        shutil.rmtree(kept)
    folder.rename(kept)


def main(arguments: Sequence[str]) -> int:
    """Build `tiny` into the folder given as the only argument; `--leave-with-stdin` ends when its parent does."""
    parser = argparse.ArgumentParser(prog="python -m rose.language_models.tiny", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--leave-with-stdin", action="store_true", help="stop when standard input closes")
    parser.add_argument("--steps", type=int, help="training steps; fewer make a worse model (for tests)")
    given = parser.parse_args(arguments)
    if given.leave_with_stdin:
        threading.Thread(target=_leave_with_stdin, daemon=True).start()
    transformers_logging.disable_progress_bar()
    build_tiny(given.folder, steps=given.steps, report=partial(print, flush=True))
    return 0


def _leave_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
