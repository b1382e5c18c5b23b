"""Which tokens a template writes as structure, and how a text that looks like one stays text.

A mark is an added token of the tokenizer that is special or stands in the template's own text. While a template runs,
the first character of each mark that a user wrote is another, rare one, so that neither the template's logic nor the
tokenizer takes it for structure; afterwards the text is encoded by a tokenizer in which the template's marks have other
names. Everything else about the tokens stays as the tokenizer makes them.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateError, nodes

from rose.errors import InvalidRequest
from rose.language_models.chat.conversation import CLOSING, OPENING, Refused

RARE_FIRST, RARE_LAST = 0x20000, 0x2A6DF
"""CJK extension B: printable, so that `repr` and JSON leave it as it is, and hardly ever in a text."""
RARE = re.compile(f"[{chr(RARE_FIRST)}-{chr(RARE_LAST)}]")
_ALIASES = range(0x100000, 0x10FFFE)
"""Characters that no text uses (private use, plane 16), one for each mark in the renamed tokenizer."""
_ALIAS = re.compile("[\U00100000-\U0010fffd]")
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_SHORT, _KNOWN = 80, 256
"""Characters of a text whose tokens are kept, and how many such texts."""
_LOGIC = re.compile(r"[<>\[\]{}|]")
"""What a constant of the template has in it that its logic looks for in a message's text as structure."""


class Tokens(NamedTuple):
    """A text as the model reads it."""

    ids: list[int]
    places: list[tuple[int, int]]
    """For each token its characters in the text."""

    def first_at(self, character: int) -> int:
        """Return the first token that begins at or behind this character."""
        return bisect_right(self.places, (character - 1, 1 << 62))


class Hidden(NamedTuple):
    """How the marks in one conversation's texts are hidden."""

    pattern: re.Pattern[str] | None
    first_characters: dict[str, str]
    """First character of a mark -> the rare character that stands for it."""
    used: frozenset[str]
    """Rare characters that the conversation holds or that stand for something."""

    def rare(self) -> Iterator[str]:
        """Yield printable characters that stand nowhere in the conversation. Raises: Refused when there are no more."""
        return _rare(self.used)

    def hide(self, text: str) -> str:
        """Return the text without any mark, of the same length."""
        if self.pattern is None:
            return text
        while True:
            found = self.pattern.sub(lambda match: self.first_characters[match[0][0]] + match[0][1:], text)
            if found == text:
                return text
            text = found

    def show(self, text: str) -> str:
        """Undo `hide`."""
        return text.translate({ord(rare): first for first, rare in self.first_characters.items()})


class Marks:
    """The marks of one tokenizer and template."""

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer = tokenizer
        literals, looked_for = _constants(source)
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        special = {int(token_id) for token_id in tokenizer.all_special_ids}
        self.special_ids = frozenset(special | {token_id for token_id, token in added.items() if token.special})
        self.ids = {
            token.content: token_id
            for token_id, token in added.items()
            if token_id in self.special_ids or (token.content.strip() and token.content in literals)
        }
        """Content -> id."""
        self.pattern = _any_of(self.ids)
        self._structure = _any_of({*self.ids, *looked_for, OPENING, CLOSING})
        self._begins = tuple(sorted({text[0] for text in {*self.ids, *looked_for, OPENING, CLOSING}}))
        _bare(tokenizer.backend_tokenizer)
        self._begin_id: int | None = tokenizer.bos_token_id
        self._known: dict[str, list[int]] = {}

    # --- hiding

    def hidden(self, texts: Sequence[str]) -> Hidden:
        """Return how the marks in a conversation's texts are hidden; nearly always there are none."""
        used = {character for text in texts if not text.isascii() for character in RARE.findall(text)}
        if not any(self._structure.search(text) for text in texts if any(begin in text for begin in self._begins)):
            return Hidden(None, {}, frozenset(used))
        # Hiding one mark can show another that overlaps it and begins otherwise, so all beginnings get a character.
        characters = dict(zip(self._begins, _rare(used), strict=False))
        return Hidden(self._structure, characters, frozenset(used | set(characters.values())))

    # --- tokens

    def encode(self, text: str, hidden: Hidden) -> Tokens:
        """Return the tokens of a rendered text whose users' marks are hidden.

        Places are those in the text with the marks shown, which has the same length. Raises: Refused for a text that
        holds marks beside characters that stand for marks here.
        """
        shown = hidden.show(text)
        if shown == text or self._spans(shown) == self._spans(text):  # no user's text holds a mark
            return self._once_begun(_encode(self._tokenizer.backend_tokenizer, shown))
        if _ALIAS.search(shown):
            raise Refused("hold a control token written as text beside characters of private use (U+100000 and above)")
        clone, ids = self._renamed
        renamed = self.pattern.sub(lambda match: self._alias_of[match[0]] * len(match[0]), text)
        tokens = _encode(clone, hidden.show(renamed))
        return self._once_begun(Tokens([ids.get(token_id, token_id) for token_id in tokens.ids], tokens.places))

    def ids_of(self, text: str, hidden: Hidden) -> list[int]:
        """Return a short text's ids; those that every prompt ends with are encoded once."""
        if hidden.pattern is not None or len(text) > _SHORT:
            return self.encode(text, hidden).ids
        if text not in self._known and len(self._known) < _KNOWN:
            self._known[text] = self.encode(text, hidden).ids
        return self._known.get(text) or self.encode(text, hidden).ids

    def holds_mark(self, text: str) -> bool:
        """Whether a text, as a user wrote it, holds one of the marks."""
        return any(begin in text for begin in self._begins) and self.pattern.search(text) is not None

    def _spans(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in self.pattern.finditer(text)]

    def _once_begun(self, tokens: Tokens) -> Tokens:
        """A mark of the beginning that is written twice is one."""
        begin = self._begin_id
        if begin is not None and tokens.ids[:2] == [begin, begin]:
            return Tokens(tokens.ids[1:], tokens.places[1:])
        return tokens

    @cached_property
    def _alias_of(self) -> dict[str, str]:
        return {content: chr(_ALIASES[number]) for number, content in enumerate(self.ids)}

    @cached_property
    def _renamed(self) -> tuple[Any, dict[int, int]]:
        """Return a tokenizer in which the marks have other names, and its marks' ids -> the real ones.

        Takes seconds and a hundred megabytes for a large vocabulary, so it is made when it is needed first.
        """
        from tokenizers import Tokenizer

        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        names = {mark: alias * len(mark) for mark, alias in self._alias_of.items()}
        for token in content["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        _rename_in_vocabulary(content["model"], names)
        clone = _bare(Tokenizer.from_str(json.dumps(content, ensure_ascii=False)))
        return clone, {clone.token_to_id(alias): self.ids[mark] for mark, alias in names.items()}


def _rare(used: Collection[str]) -> Iterator[str]:
    for code in range(RARE_FIRST, RARE_LAST + 1):
        if chr(code) not in used:
            yield chr(code)
    raise Refused("hold more texts than can be followed through a template")


def _constants(source: str) -> tuple[str, set[str]]:
    """Return all the text that stands in a template, and the constants that it looks for in messages as structure.

    Raises: InvalidRequest when the template is none.
    """
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", source))
    except TemplateError as error:
        raise InvalidRequest(
            f"The model's chat template cannot be read: {(str(error).splitlines() or [''])[0][:300]}",
            code="model_not_available",
            param="model",
        ) from error
    pieces = [node.data for node in tree.find_all(nodes.TemplateData)]
    pieces += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    logic = [node for kind in (nodes.Compare, nodes.Call) for node in tree.find_all(kind)]
    looked_for = {
        constant.value
        for node in logic
        for constant in node.find_all(nodes.Const)
        if isinstance(constant.value, str) and len(constant.value.strip()) > 2 and _LOGIC.search(constant.value)
    }
    return "\0".join(pieces), {text.strip() for text in looked_for if _LOGIC.match(text.strip())}


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _bare(tokenizer: Any) -> Any:
    """Let a tokenizer add, cut and pad nothing, and tell each token's exact place."""
    tokenizer.post_processor = None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode(tokenizer: Any, text: str) -> Tokens:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return Tokens(encoding.ids, encoding.offsets)


def _rename_in_vocabulary(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename marks that are entries of the model, too; otherwise they could be made of a user's text."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        merged = {part for merge in model.get("merges") or () for part in (merge if isinstance(merge, list) else ())}
        for mark, alias in names.items():
            if mark in vocabulary and mark not in merged:
                vocabulary[alias] = vocabulary.pop(mark)
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
