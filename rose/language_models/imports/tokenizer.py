"""Make the tokenizer of a GGUF: transformers converts its vocabulary, the way it splits text is set here.

A file names that way (`tokenizer.ggml.pre`). Taking another one gives other tokens than the model was trained on, and
nothing fails, so an unknown name is refused.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig

from rose.language_models.imports.gguf_file import GgufFile, NotImportable

_WORDS = r"[^\r\n\p{L}\p{N}]?"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}\p{{L}}+|\p{{N}}|{_REST}"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_WORDS}{_UPPER}*{_LOWER}+|{_WORDS}{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_REST}"
_GPT4O = (
    rf"{_WORDS}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORDS}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_CASED_REST}"
)
SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
    "gpt-4o": _GPT4O,
}
"""Pattern that cuts text before its pieces are merged, by the file's name for it."""
DIGITS = ("smollm",)
"""Each digit apart, then GPT-2's own pattern."""
PLAIN = ("gpt-2", "gpt2")
COMPOSED = ("qwen2", "deepseek-r1-qwen")
"""Their tokenizers compose letters and accents (NFC) first."""


def write_tokenizer(file: GgufFile, folder: Path, chat_template: str | None) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json into `folder`.

    Raises: NotImportable when the file has no chat template or its tokenizer is not known.
    """
    template = chat_template or file.value("tokenizer.chat_template")
    if not template:
        raise NotImportable(
            f"{file.path.name} has no chat template: it is a model that was not trained to chat, or its converter "
            "left the template out.",
            hint="Take the instruct version of the model, or give its template: --chat-template chat_template.jinja",
        )
    tokenizer = _converted(file)
    _set_split(tokenizer, file)
    tokenizer.chat_template = template
    tokenizer.model_max_length = int(file.required("context_length"))
    tokenizer.save_pretrained(folder)
    _generation_config(file).save_pretrained(folder)


def _converted(file: GgufFile) -> Any:
    with tempfile.TemporaryDirectory() as alone:  # a tokenizer that lies beside the file would be taken instead
        (Path(alone) / "model.gguf").symlink_to(file.path.resolve())
        try:
            return AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
        except (ValueError, KeyError, NotImplementedError, AttributeError, TypeError) as error:
            kind = file.value("tokenizer.ggml.model")
            raise NotImportable(
                f"The tokenizer in {file.path.name} ({kind}) cannot be converted: {str(error).rstrip('.')}.",
                hint="Import the folder with its original tokenizer: rose models import FOLDER",
            ) from error


def _set_split(tokenizer: Any, file: GgufFile) -> None:
    if file.value("tokenizer.ggml.model") != "gpt2":
        return  # SentencePiece needs no pattern
    name = file.value("tokenizer.ggml.pre", "")
    if name in DIGITS:
        first: Any = pre_tokenizers.Digits(individual_digits=True)
    elif name in SPLITS:
        first = pre_tokenizers.Split(Regex(SPLITS[name]), behavior="isolated")
    elif name in PLAIN:
        return
    else:
        said = f"named {name!r}, which ROSE does not know" if name else "not named in it"
        raise NotImportable(
            f"The way in which the tokenizer of {file.path.name} splits text is {said}.",
            hint="Import the folder with its original tokenizer: rose models import FOLDER",
        )
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in DIGITS)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, bytes_])
    if name in COMPOSED:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()


def _generation_config(file: GgufFile) -> GenerationConfig:
    ends = [file.value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return GenerationConfig(
        bos_token_id=file.value("tokenizer.ggml.bos_token_id"),
        eos_token_id=sorted({int(end) for end in ends if end is not None}) or None,
        pad_token_id=file.value("tokenizer.ggml.padding_token_id"),
    )
