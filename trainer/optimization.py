"""One optimizer step, one evaluation: the arithmetic of a run, and what happens when memory runs out.

Knows neither files nor the supervisor. A step's numbers leave the device once, together.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from rose.domain.hyperparameters import Hyperparameters
from rose.errors import RoseError
from rose.language_models.load import is_out_of_memory
from trainer.batches import Document, pack
from trainer.hardware import Hardware, OutOfMemory
from trainer.methods import Method
from trainer.methods.sft import Forward
from trainer.recovery import RunState
from trainer.trained_model import TrainedModel

MAX_SKIPPED = 3
"""Consecutive steps that may be skipped because their loss or gradient is not finite."""
MAX_EXPLODED = 5
EXPLOSION_FACTOR = 2.0
EXPLOSION_MARGIN = 1.0
"""A loss of twice that of the first step, and one nat per token worse than knowing nothing but how often each token is
learned, five steps in a row: a model does not come back from there, and no data looks like that."""
_DIVERGED_HINT = "Lower learning_rate_multiplier. Checkpoints of earlier epochs are kept."


class TrainingDiverged(RoseError):
    """The loss left all bounds."""

    default_code = "training_diverged"


class Interrupted(Exception):
    """The supervisor asked for a drain in the middle of an evaluation."""


class StepResult(NamedTuple):
    """Numbers of one optimizer step."""

    loss: float
    accuracy: float
    gradient_norm: float
    tokens: int
    seconds: float
    applied: bool
    """False when loss or gradient was not finite, so that nothing was changed."""


class Evaluation(NamedTuple):
    """Numbers over the whole validation set."""

    loss: float
    accuracy: float


class Optimization:
    """Model, optimizer and method of one run. `warn` tells the user something; `alive` is called per micro-batch."""

    def __init__(
        self,
        trained: TrainedModel,
        hyperparameters: Hyperparameters,
        method: Method,
        forward: Forward,
        hardware: Hardware,
        state: RunState,
        blind_loss: float,
        warn: Callable[[str, str], None],
        alive: Callable[[], None],
    ) -> None:
        self.trained = trained
        self.hyperparameters = hyperparameters
        self.method = method
        self.forward = forward
        self.hardware = hardware
        self.state = state
        self.blind_loss = blind_loss
        self._warn = warn
        self._alive = alive
        self.optimizer = torch.optim.AdamW(
            list(trained.parameters.values()),
            lr=hyperparameters.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=hyperparameters.weight_decay,
        )

    def step(self, documents: Sequence[Document], learning_rate: float) -> StepResult:
        """Train on the documents of one step's examples, unless loss or gradient is not finite.

        Raises: OutOfMemory.
        """
        started = time.monotonic()
        loss, accuracy, norm = self._gradients(documents)
        applied = math.isfinite(loss) and math.isfinite(norm)
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self._apply()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(document) for document in documents)
        return StepResult(loss, accuracy, norm, tokens, time.monotonic() - started, applied)

    def _apply(self) -> None:
        """Change the weights by their gradients. Raises: OutOfMemory; the first step makes Adam's moments."""
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._too_much("The optimizer's moments do", self._what_would_fit()) from error

    def _gradients(self, documents: Sequence[Document]) -> tuple[float, float, float]:
        """Leave the step's clipped gradients in the parameters; return loss, accuracy and the norm before."""
        before = self.hardware.random_state()
        while True:
            try:
                return self._attempt(documents)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler, which would keep the failed pass's tensors alive. The step starts anew with the same
            # dropout, so that less memory changes no result.
            self.optimizer.zero_grad(set_to_none=True)
            self._shrink(documents)
            self.hardware.set_random_state(before)

    def _attempt(self, documents: Sequence[Document]) -> tuple[float, float, float]:
        model = self.trained.model
        model.train()
        denominator = math.fsum(document.label_weight for document in documents)
        totals = torch.zeros(2, dtype=torch.float32, device=self.hardware.device)
        for part in self._micro_batches(documents):
            self._alive()
            batch = self.method.assemble(part, self.hardware.device)
            with self.hardware.autocast(trains_weights=self.trained.trains_weights):
                loss, correct = self.method.loss(model, batch, self.forward)
            (loss / denominator).backward()
            totals += torch.stack((loss.detach(), correct))
        gradients = [p.grad for p in self.trained.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(
            list(self.trained.parameters.values()), self.hyperparameters.max_gradient_norm, norm
        )
        loss_sum, correct_sum, norm_value = torch.cat((totals, norm.float()[None])).tolist()
        return loss_sum / denominator, correct_sum / denominator, norm_value

    def evaluate(self, documents: Sequence[Document], interrupted: Callable[[], bool]) -> Evaluation:
        """Compute the loss over all documents without gradients; the run's random state stays as it is.

        Raises: Interrupted when `interrupted` says so between two micro-batches; OutOfMemory.
        """
        before = self.hardware.random_state()
        try:
            while True:
                try:
                    return self._evaluate(documents, interrupted)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                self._shrink(documents)
        finally:
            self.hardware.set_random_state(before)

    def _evaluate(self, documents: Sequence[Document], interrupted: Callable[[], bool]) -> Evaluation:
        model = self.trained.model
        model.eval()
        denominator = math.fsum(document.label_weight for document in documents)
        totals = torch.zeros(2, dtype=torch.float64, device="cpu" if self._has_no_doubles() else self.hardware.device)
        with torch.no_grad():
            for part in self._micro_batches(documents):
                self._alive()
                if interrupted():
                    raise Interrupted
                batch = self.method.assemble(part, self.hardware.device)
                with self.hardware.autocast(trains_weights=self.trained.trains_weights):
                    loss, correct = self.method.loss(model, batch, self.forward)
                totals += torch.stack((loss, correct)).to(totals)
        loss_sum, correct_sum = totals.tolist()
        return Evaluation(loss_sum / denominator, correct_sum / denominator)

    def logprobs(self, document: Document) -> list[float]:
        """Return the log-probability (nats) of each learned token of one document, in order, as the model is now."""
        model = self.trained.model
        model.eval()
        with torch.no_grad(), self.hardware.autocast(trains_weights=self.trained.trains_weights):
            batch = self.method.assemble([document], self.hardware.device)
            return self.method.logprobs(model, batch, self.forward).tolist()

    def _has_no_doubles(self) -> bool:
        return self.hardware.device.type == "mps"

    def _micro_batches(self, documents: Sequence[Document]) -> list[list[Document]]:
        budget = self.state.token_budget if self.forward.packed else 0
        return [[documents[i] for i in part] for part in pack([len(d) for d in documents], budget)]

    def _shrink(self, documents: Sequence[Document]) -> None:
        """Make the next attempt need less memory: fewer tokens at once, then recomputed activations.

        Raises: OutOfMemory when one example alone is too much even so.
        """
        self.hardware.release_cache()
        state = self.state
        longest = max(len(document) for document in documents)
        largest = max(sum(len(d) for d in part) for part in self._micro_batches(documents))
        if self.forward.packed and largest > longest:
            # Below what was tried, else the same micro-batches come again.
            state.token_budget = max(longest, min(state.token_budget, largest) // 2)
            self._warn(
                "less_memory", f"Memory ran out; going on with {state.token_budget} tokens at once (same results)."
            )
            return
        if not state.checkpointing and self.trained.model.supports_gradient_checkpointing:
            self.recompute_activations()
            self._warn("less_memory", "Memory ran out; activations are now recomputed (same results, slower).")
            return
        shorter = f"examples of at most about {longest // 2} tokens"
        raise self._too_much(f"One example of {longest} tokens does", self._what_would_fit(shorter))

    def _too_much(self, what: str, hint: str) -> OutOfMemory:
        total = self.hardware.total_memory_bytes() / (1 << 30)
        where = f"the {total:.0f} GiB of memory of {self.hardware.describe()}"
        return OutOfMemory(f"{what} not fit into {where} beside the model.", hint=hint)

    def _what_would_fit(self, *more: str) -> str:
        advice = [*more, "a smaller base model", "a trainer with more memory"]
        if self.trained.trains_weights:
            advice.insert(0, "LoRA instead of full fine-tuning (use_lora true)")
        return f"What would fit: {', '.join(advice[:-1])}, or {advice[-1]}."

    def recompute_activations(self) -> None:
        """Keep no activations for the backward pass; also called for a run that goes on from one that had to."""
        self.state.checkpointing = True
        model, options = self.trained.model, {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(options)
        else:  # its name before transformers 5.20
            model.gradient_checkpointing_enable(options)

    def judge(self, step: int, result: StepResult) -> None:
        """Count skipped steps and exploded losses in `state`.

        Raises: TrainingDiverged when there were too many in a row.
        """
        state = self.state
        if not result.applied:
            state.skipped += 1
            what = f"The loss of step {step} is {result.loss} and its gradient norm {result.gradient_norm}"
            if state.skipped > MAX_SKIPPED:
                raise TrainingDiverged(f"{what}, after {MAX_SKIPPED} steps of the same kind.", hint=_DIVERGED_HINT)
            self._warn("step_skipped", f"{what}; the step was not applied.")
            return
        state.skipped = 0
        if state.first_loss is None:
            state.first_loss = result.loss
        bound = max(EXPLOSION_FACTOR * state.first_loss, self.blind_loss + EXPLOSION_MARGIN)
        state.exploded = state.exploded + 1 if result.loss > bound else 0
        if state.exploded >= MAX_EXPLODED:
            raise TrainingDiverged(
                f"The loss exploded: it was {state.first_loss:.3g} at the start, is {result.loss:.3g} at step {step} "
                f"and has been above {bound:.3g} for {MAX_EXPLODED} steps.",
                hint=_DIVERGED_HINT,
            )


def blind_loss(documents: Iterable[Document]) -> float:
    """Return the loss in nats per label token of always guessing by the labels' overall frequencies: their entropy."""
    counts: Counter[int] = Counter()
    for document in documents:
        counts.update(token for token, weight in zip(document.ids, document.weights, strict=True) if weight)
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values())
