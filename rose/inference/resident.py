"""A model in memory, with its tokenizer and the adapters that lie ready on it."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache

from rose.inference.rows import Runner
from rose.inference.text import REPLACEMENT
from rose.language_models.locate import LocatedBase
from rose.language_models.template import ChatTemplate

FULL = "full:"
"""What the key of a full model begins with; the hash of its folder follows."""


class Resident:
    """A loaded base, or a full model under the hash of its folder."""

    def __init__(self, key: str, located: LocatedBase, runner: Runner, template: ChatTemplate) -> None:
        self.key = key
        self.located = located
        self.runner = runner
        self.template = template
        self.tokenizer = template.tokenizer
        self.vocabulary = int(runner.model.config.get_text_config().vocab_size)
        self.context_tokens = runner.context_tokens
        self.stop_ids = template.stop_ids
        self.last_used = time.monotonic()
        """Monotonic seconds."""
        self.adapter_used: dict[str, float] = {}
        """Adapter hash -> monotonic seconds of its last use."""
        self.leaving: str | None = None
        """An adapter that goes as soon as its rows have ended, since a request waits for its slot; requests for it that
        are younger than that one wait, too."""
        self._byte_level = "ByteLevel" in repr(self.tokenizer.backend_tokenizer.decoder)
        self._tokens: dict[int, tuple[str, list[int] | None]] = {}

    def weights_of(self, adapter: str | None) -> str | None:
        """Return the hash of the weights that a row with this adapter is computed with; None: a base alone."""
        return adapter or (self.key.removeprefix(FULL) if self.key.startswith(FULL) else None)

    @property
    def dtype(self) -> str:
        """Of the model's arithmetic."""
        return str(self.runner.model.dtype).removeprefix("torch.")

    def touch(self, adapter: str | None) -> None:
        """Note that the model, and this adapter on it, is in use."""
        self.last_used = time.monotonic()
        if adapter is not None:
            self.adapter_used[adapter] = self.last_used

    def forget(self, adapter: str) -> None:
        """Free an adapter's memory; no request may be using it."""
        self.runner.remove_adapter(adapter)
        self.adapter_used.pop(adapter, None)

    def make_slot(self, most: int, rows: Counter[str | None]) -> bool:
        """Make sure that one more adapter may come, of at most so many; `rows` counts the requests of each in use.

        False: all are in use, and one of them is leaving.
        """
        loaded = self.runner.adapters()
        idle = sorted((key for key in loaded if not rows[key]), key=self._used)
        surplus = len(loaded) + 1 - most
        for key in idle[: max(0, surplus)]:
            self.forget(key)
        if len(idle) >= surplus:
            self.leaving = None
            return True
        if self.leaving not in loaded:
            self.leaving = min(loaded, key=lambda key: (rows[key], self._used(key)))
        return False

    def _used(self, adapter: str) -> float:
        return self.adapter_used.get(adapter, 0.0)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens, but for those that a thought is written with."""
        shown = [token_id for token_id in ids if token_id not in self.template.silent_ids]
        return self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def token(self, token_id: int) -> tuple[str, list[int] | None]:
        """Return a token's text and, where they can be known, its bytes."""
        if token_id not in self._tokens:
            self._tokens[token_id] = self._describe(token_id)
        return self._tokens[token_id]

    def _describe(self, token_id: int) -> tuple[str, list[int] | None]:
        text: str = self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        piece: str | None = self.tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return text, None
        if single := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return text, [int(single[1], 16)]
        alphabet = _byte_alphabet()
        if self._byte_level and all(character in alphabet for character in piece):
            return text, [alphabet[character] for character in piece]
        return text, None if REPLACEMENT in text else list(text.encode())


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return the byte for each character of byte-level tokens: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
