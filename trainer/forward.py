"""How likely a model finds some documents: side by side in one pass where that changes nothing, else one by one.

Knows no method and no step. What a model can do is tried at the start of every run.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from rose.methods.method import Document
from trainer.attention import use_attention, use_packed_attention
from trainer.losses import label_cross_entropy, label_logprobs, logits_cross_entropy, logits_logprobs

_PROBED_ROWS = 32
"""Label rows whose logits are compared; a row has as many numbers as the vocabulary."""


class MicroBatch(NamedTuple):
    """Documents side by side in one row of T tokens, with R label rows; all on the device."""

    ids: torch.Tensor
    """[1, T] int64."""
    positions: torch.Tensor
    """[1, T] int64, counted within each document."""
    rows: torch.Tensor
    """[R] int64: where the states that predict the targets are."""
    targets: torch.Tensor
    """[R] int64."""
    weights: torch.Tensor
    """[R] fp32."""
    documents: torch.Tensor
    """[R] int64: whose row it is, of D documents."""
    lengths: tuple[int, ...]
    """Tokens of each document; they sum to T."""
    borders: torch.Tensor
    """[documents + 1] int32: 0 and the running sums of the lengths."""

    def options(self, forward: Forward) -> dict[str, Any]:
        """Return what packed attention needs besides the tokens."""
        return {"document_lengths": self.lengths, "document_borders": self.borders} if forward.packed else {}


class Likelihoods(NamedTuple):
    """Of D documents."""

    logprobs: torch.Tensor
    """[D]: the sum of weight x log-probability of the targets, nats."""
    correct: torch.Tensor
    """[D]: the sum of the weights of the targets that were the likeliest token."""


class Forward(NamedTuple):
    """How this model computes label losses; found out by `choose_forward`."""

    packed: bool
    """Several documents share a row."""
    own_head: bool
    """Label rows go through the output layer in chunks; else the model makes their logits itself."""


def assemble(documents: Sequence[Document], device: torch.device) -> MicroBatch:
    """Make the tensors of a micro-batch, in one copy per tensor to the device."""
    ids, weights = array("q"), array("f")
    positions: list[int] = []
    for document in documents:
        ids.extend(document.ids)
        weights.append(0.0)
        weights.extend(document.weights[1:])  # nothing comes before the first token that could predict it
        positions.extend(range(len(document)))
    all_ids = torch.tensor(ids, dtype=torch.int64)
    all_weights = torch.tensor(weights, dtype=torch.float32)
    labels = all_weights.nonzero().squeeze(1)
    lengths = tuple(len(document) for document in documents)
    return MicroBatch(
        ids=all_ids[None].to(device),
        positions=torch.tensor(positions, dtype=torch.int64)[None].to(device),
        rows=(labels - 1).to(device),
        targets=all_ids[labels].to(device),
        weights=all_weights[labels].to(device),
        documents=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[labels].to(device),
        lengths=lengths,
        borders=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device),
    )


def likelihoods(model: Any, documents: Sequence[Document], forward: Forward, device: torch.device) -> Likelihoods:
    """Return how likely each of D documents is, [D] fp32 with gradients, and how much of it the model guesses."""
    parts = [documents] if forward.packed else [[document] for document in documents]
    found = [_likelihoods(model, assemble(part, device), forward) for part in parts]
    return found[0] if len(found) == 1 else Likelihoods(*map(torch.cat, zip(*found, strict=True)))


def _likelihoods(model: Any, batch: MicroBatch, forward: Forward) -> Likelihoods:
    if forward.own_head:
        states = _label_states(model, batch, forward)
        losses, correct = label_cross_entropy(states, model.get_output_embeddings(), batch.targets, batch.weights)
    else:
        losses, correct = logits_cross_entropy(_label_logits(model, batch, forward), batch.targets, batch.weights)
    none = losses.new_zeros(len(batch.lengths))
    return Likelihoods(none.index_add(0, batch.documents, -losses), none.index_add(0, batch.documents, correct))


def logprobs(model: Any, batch: MicroBatch, forward: Forward) -> torch.Tensor:
    """Return the log-probabilities [R] fp32 of the targets, by the forward pass that `likelihoods` takes."""
    if forward.own_head:
        states = _label_states(model, batch, forward)
        return label_logprobs(states, model.get_output_embeddings(), batch.targets)
    return logits_logprobs(_label_logits(model, batch, forward), batch.targets)


def _label_states(model: Any, batch: MicroBatch, forward: Forward) -> torch.Tensor:
    """Return the states [R, D] from which the targets are predicted."""
    return model.get_decoder()(**_inputs(batch, forward)).last_hidden_state[0][batch.rows]


def _label_logits(model: Any, batch: MicroBatch, forward: Forward) -> torch.Tensor:
    """Return the logits [R, V] of the targets."""
    return model(**_inputs(batch, forward), logits_to_keep=batch.rows).logits[0]


def _inputs(batch: MicroBatch, forward: Forward) -> dict[str, Any]:
    return {"input_ids": batch.ids, "position_ids": batch.positions, "use_cache": False, **batch.options(forward)}


def choose_forward(model: Any, documents: Sequence[Document], device: torch.device) -> tuple[Forward, str | None]:
    """Try this model with two documents and return what gives the same as transformers does for each alone.

    Packing that leaks between documents, and output layers that scale or cap their logits, would train without an
    error on something else than what is asked later; so both are tested at the start of every run. The second result
    says what was found not to work, or None. The model is left in evaluation mode, its random state untouched.
    """
    first, second = _two_short(documents)
    exact = next(model.parameters()).dtype == torch.float32
    own_attention: str = model.config._attn_implementation
    own_head = packed = False
    why = ""
    model.eval()
    with torch.no_grad():
        try:
            batches = [assemble([document], device) for document in (first, second)]
            apart = [_states(model, batch, packed=False) for batch in batches]
            own_head = all(_has_plain_head(model, batch, states) for batch, states in zip(batches, apart, strict=True))
            use_packed_attention(model)
            together = _states(model, assemble([first, second], device), packed=True)
            tolerance = 1e-3 if exact else 5e-2
            packed = _close(together, torch.cat(apart), tolerance) and not _leaks(model, first, second, together)
        except (NotImplementedError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            why = f": {error}"
    if packed:
        return Forward(packed=True, own_head=own_head), None
    use_attention(model, own_attention)
    return Forward(packed=False, own_head=own_head), (
        f"Examples are trained one by one, which is slower: packing them would change this model's results{why}."
    )


def _has_plain_head(model: Any, batch: MicroBatch, states: torch.Tensor) -> bool:
    """Tell whether the model's logits are its output layer's product and nothing more.

    Both are the same arithmetic on the same numbers, so that even a cap far above the logits shows.
    """
    rows, head = batch.rows[:_PROBED_ROWS], model.get_output_embeddings()
    inputs = {"input_ids": batch.ids, "position_ids": batch.positions, "use_cache": False}
    return _close(head(states[rows]), model(**inputs, logits_to_keep=rows).logits[0], 1e-3)


def _leaks(model: Any, first: Document, second: Document, together: torch.Tensor) -> bool:
    """Tell whether a document's states change with its neighbour's tokens, by however little.

    Where nothing leaks, the same numbers go through the same kernels, so the tolerance can be far below what packed
    and separate passes differ by.
    """
    device, border = together.device, len(first)
    beside_other = _states(model, assemble([_other(first, model), second], device), packed=True)
    before_other = _states(model, assemble([first, _other(second, model)], device), packed=True)
    return not (
        _close(beside_other[border:], together[border:], 1e-6)
        and _close(before_other[:border], together[:border], 1e-6)
    )


def _other(document: Document, model: Any) -> Document:
    """Return a document of the same length with other tokens."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return Document(ids=array("q", [(token + 1) % vocabulary for token in document.ids]), weights=document.weights)


def _two_short(documents: Sequence[Document]) -> tuple[Document, Document]:
    shortest = sorted(documents, key=len)[:2]
    first, second = shortest[0], shortest[-1]
    return _cut(first), _cut(second)


def _cut(document: Document, tokens: int = 256) -> Document:
    """Return the document's last tokens, where the labels are."""
    return Document(ids=document.ids[-tokens:], weights=document.weights[-tokens:])


def _states(model: Any, batch: MicroBatch, *, packed: bool) -> torch.Tensor:
    options = batch.options(Forward(packed=packed, own_head=True))
    result = model.get_decoder()(input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **options)
    return result.last_hidden_state[0]


def _close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    """Compare by the norm of the difference, relative to the norm of what is wanted."""
    difference = torch.linalg.vector_norm(got.double() - want.double())
    return bool(difference <= tolerance * torch.linalg.vector_norm(want.double()) + 1e-12)
