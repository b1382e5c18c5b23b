"""Writes tokenizer.json where a package ships another form; runs where the packages for reading it are installed.

`python converting.py CONVERTERS GGUF OUT`
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

SPECIAL = ("<s>", "</s>", "<unk>")


def main(folder: Path, gguf: Path, out: Path) -> None:
    sys.path.insert(0, str(folder))
    data = folder / "mistral_common" / "data"
    mistral(data / "mistral_instruct_tokenizer_240323.model.v3", out / "mistral")
    tekken(data / "tekken_240718.json", out / "tekken")
    smollm2(gguf, out / "smollm2")


def mistral(model: Path, out: Path) -> None:
    """The SentencePiece model of Mistral 7B v0.3, and the template that Mistral's library writes for it."""
    from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
    from transformers import LlamaTokenizer

    out.mkdir(parents=True)
    shutil.copy(model, out / "tokenizer.model")
    LlamaTokenizer.from_pretrained(out).save_pretrained(out)
    (out / "tokenizer.model").unlink()
    (out / "chat_template.jinja").write_text(convert_tokenizer_to_chat_template(model), encoding="utf-8")


def tekken(file: Path, out: Path) -> None:
    """The byte-pair vocabulary of Mistral Nemo."""
    from transformers.integrations.mistral.tokenizer import MistralConverter

    out.mkdir(parents=True)
    MistralConverter(str(file)).converted().save(str(out / "tokenizer.json"))
    begin, end, unknown = SPECIAL
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "unk_token": unknown,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def smollm2(gguf: Path, out: Path) -> None:
    """The tokenizer and template in a GGUF, as transformers reads them."""
    from transformers import AutoTokenizer

    out.mkdir(parents=True)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
