"""Show lines of training data as a model would see them, by the template of its base alone: no weights are loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

import msgspec

from rose.domain.previews import LinePreview, Piece, Preview
from rose.domain.training_data import Problem, UnusableExample
from rose.errors import InvalidRequest
from rose.inference.loading import Loader
from rose.inference.request import Target
from rose.language_models.locate import LocatedBase
from rose.language_models.template import ChatTemplate, load_template
from rose.methods import read_any

MAX_LINES = 50
"""Most lines of one request."""
MAX_TEMPLATES = 4
"""Templates that are kept; a large tokenizer takes seconds to load."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a file."""

    number: int
    """From 1, as in the file."""
    text: str


class PreviewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be shown."""

    rose: Target
    lines: list[Line]
    thinking: bool = False
    """As the job would train: whether any learned answer of the file has a thought."""


class Previews:
    """Makes previews; blocking, callable from several threads."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._templates: OrderedDict[str, ChatTemplate] = OrderedDict()
        self._lock = Lock()

    def preview(self, data: bytes) -> Preview:
        """Return what `data`, a PreviewRequest as JSON, asks for. Raises: InvalidRequest, NotFound."""
        try:
            request = msgspec.json.decode(data, type=PreviewRequest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"The preview request is not valid: {error}.", code="invalid_json") from None
        if len(request.lines) > MAX_LINES:
            raise InvalidRequest(f"A preview shows at most {MAX_LINES} lines.", code="invalid_value", param="count")
        located = self._loader.locate(request.rose)
        template = self._template(located)
        with self._lock:  # a tokenizer serves one thread at a time
            shown = [_shown(template, located.context_tokens, line, request.thinking) for line in request.lines]
        return Preview(
            model=request.rose.model, thinking=request.thinking, context_tokens=located.context_tokens, data=shown
        )

    def _template(self, located: LocatedBase) -> ChatTemplate:
        with self._lock:
            key = located.fingerprint
            if key not in self._templates:
                self._templates[key] = load_template(located.path, rows=located.embedding_rows)
            self._templates.move_to_end(key)
            while len(self._templates) > MAX_TEMPLATES:
                self._templates.popitem(last=False)
            return self._templates[key]


def _shown(template: ChatTemplate, context_tokens: int, line: Line, thinking: bool) -> LinePreview:
    for item in read_any([line.text.encode()]):
        if isinstance(item, Problem):
            return LinePreview(line=line.number, problem=item.text)
        sequences: list[list[Piece]] = []
        cut = False
        for conversation in item.conversations:
            example = msgspec.structs.replace(conversation, line=line.number, number=line.number)
            try:
                found = template.preview(example, context_tokens, thinking=thinking)
            except UnusableExample as error:
                return LinePreview(line=line.number, problem=error.problem.text)
            sequences += found.sequences
            cut = cut or found.cut
        return LinePreview(
            line=line.number,
            sequences=sequences,
            tokens=_count(sequences, learned=False),
            learned_tokens=_count(sequences, learned=True),
            cut=cut,
        )
    return LinePreview(line=line.number, problem="the line is empty")


def _count(sequences: Sequence[Sequence[Piece]], *, learned: bool) -> int:
    return sum(piece.tokens for sequence in sequences for piece in sequence if piece.learned or not learned)
