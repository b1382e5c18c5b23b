"""One optimizer step, one evaluation: the arithmetic of a run, and what happens when memory runs out.

Knows neither files nor the supervisor. A step's numbers leave the device once, together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from rose.domain.hyperparameters import Hyperparameters
from rose.errors import RoseError
from rose.language_models.load import is_out_of_memory
from rose.methods.method import Document, Method, Scores, Unit
from trainer import forward as forwards
from trainer.batches import pack
from trainer.forward import Forward
from trainer.hardware import Hardware, OutOfMemory
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


Result = TypeVar("Result")


class TrainingDiverged(RoseError):
    """The loss left all bounds."""

    default_code = "training_diverged"


class Interrupted(Exception):
    """The supervisor asked for a drain in the middle of an evaluation."""


class StepResult(NamedTuple):
    """Numbers of one optimizer step."""

    loss: float
    measured: dict[str, float]
    """What the method measures beside it, the mean over the step."""
    gradient_norm: float
    tokens: int
    seconds: float
    applied: bool
    """False when loss or gradient was not finite, so that nothing was changed."""


class Evaluation(NamedTuple):
    """Numbers over the whole validation set."""

    loss: float
    measured: dict[str, float]


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
        self.options = hyperparameters.options
        self.blind_loss = blind_loss
        self._warn = warn
        self._alive = alive
        self.optimizer = torch.optim.AdamW(
            list(trained.parameters.values()),
            lr=hyperparameters.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=hyperparameters.weight_decay,
        )

    def step(self, units: Sequence[Unit], learning_rate: float) -> StepResult:
        """Train on the units of one step's examples, unless loss or gradient is not finite.

        Raises: OutOfMemory.
        """
        started = time.monotonic()
        loss, measured, norm = self._gradients(units)
        applied = math.isfinite(loss) and math.isfinite(norm)
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self._apply()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(unit.tokens for unit in units)
        return StepResult(loss, measured, norm, tokens, time.monotonic() - started, applied)

    def _apply(self) -> None:
        """Change the weights by their gradients. Raises: OutOfMemory; the first step makes Adam's moments."""
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._too_much("The optimizer's moments do", self._what_would_fit()) from error

    def _gradients(self, units: Sequence[Unit]) -> tuple[float, dict[str, float], float]:
        """Leave the step's clipped gradients in the parameters; return loss, what else is measured, the norm before."""
        before = self.hardware.random_state()
        while True:
            try:
                return self._attempt(units)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler, which would keep the failed pass's tensors alive. The step starts anew with the same
            # dropout, so that less memory changes no result.
            self.optimizer.zero_grad(set_to_none=True)
            self._shrink(units)
            self.hardware.set_random_state(before)

    def _attempt(self, units: Sequence[Unit]) -> tuple[float, dict[str, float], float]:
        self.trained.model.train()
        denominator = math.fsum(self.method.weight(unit) for unit in units)
        totals = _Totals(torch.float32, self.hardware.device)
        for part in self._micro_batches(units):
            self._alive()
            with self.hardware.autocast(trains_weights=self.trained.trains_weights):
                loss, measured = self.method.loss(self._scores(part), self.options)
            (loss / denominator).backward()
            totals.add(loss.detach(), measured)
        gradients = [p.grad for p in self.trained.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(
            list(self.trained.parameters.values()), self.hyperparameters.max_gradient_norm, norm
        )
        loss_value, means, norm_value = totals.means(denominator, norm)
        return loss_value, means, norm_value

    def _scores(self, units: Sequence[Unit]) -> Scores:
        """Return how likely the model finds the units now."""
        documents = [document for unit in units for document in unit.documents]
        logprobs, correct = forwards.likelihoods(self.trained.model, documents, self.forward, self.hardware.device)
        known = [number for unit in units for number in unit.reference or (0.0,) * len(unit.documents)]
        return Scores(units, logprobs, correct, logprobs.new_tensor(known))

    def evaluate(self, units: Sequence[Unit], interrupted: Callable[[], bool]) -> Evaluation:
        """Compute the loss over all units without gradients; the run's random state stays as it is.

        Raises: Interrupted when `interrupted` says so between two micro-batches; OutOfMemory.
        """
        denominator = math.fsum(self.method.weight(unit) for unit in units)

        def evaluate() -> Evaluation:
            totals = _Totals(torch.float64, torch.device("cpu") if self._has_no_doubles() else self.hardware.device)
            for part in self._without_gradients(units, interrupted):
                with self.hardware.autocast(trains_weights=self.trained.trains_weights):
                    totals.add(*self.method.loss(self._scores(part), self.options))
            return Evaluation(*totals.means(denominator)[:2])

        return self._patiently(evaluate, units)

    def note_reference(self, units: Sequence[Unit], interrupted: Callable[[], bool]) -> None:
        """Note in each unit how likely the model, as it is now, finds its documents.

        Raises: as evaluate.
        """

        def note() -> None:
            for part in self._without_gradients(units, interrupted):
                with self.hardware.autocast(trains_weights=self.trained.trains_weights):
                    numbers = iter(self._scores(part).logprobs.tolist())
                for unit in part:
                    unit.reference = tuple(next(numbers) for _ in unit.documents)

        self._patiently(note, units)

    def _patiently(self, compute: Callable[[], Result], units: Sequence[Unit]) -> Result:
        """Return what `compute` does over `units`, with less at once where memory runs out; draws no random number."""
        before = self.hardware.random_state()
        try:
            while True:
                try:
                    self.trained.model.eval()
                    with torch.no_grad():
                        return compute()
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                self._shrink(units)
        finally:
            self.hardware.set_random_state(before)

    def _without_gradients(self, units: Sequence[Unit], interrupted: Callable[[], bool]) -> Iterator[list[Unit]]:
        """Yield the micro-batches of an evaluation. Raises: Interrupted."""
        for part in self._micro_batches(units):
            self._alive()
            if interrupted():
                raise Interrupted
            yield part

    def logprobs(self, document: Document) -> list[float]:
        """Return the log-probability (nats) of each learned token of one document, in order, as the model is now."""
        model = self.trained.model
        model.eval()
        with torch.no_grad(), self.hardware.autocast(trains_weights=self.trained.trains_weights):
            batch = forwards.assemble([document], self.hardware.device)
            return forwards.logprobs(model, batch, self.forward).tolist()

    def _has_no_doubles(self) -> bool:
        return self.hardware.device.type == "mps"

    def _micro_batches(self, units: Sequence[Unit]) -> list[list[Unit]]:
        budget = self.state.token_budget if self.forward.packed else 0
        return [[units[i] for i in part] for part in pack([unit.tokens for unit in units], budget)]

    def _shrink(self, units: Sequence[Unit]) -> None:
        """Make the next attempt need less memory: fewer tokens at once, then recomputed activations.

        Raises: OutOfMemory when one example alone is too much even so.
        """
        self.hardware.release_cache()
        state = self.state
        longest = max(unit.tokens for unit in units)
        largest = max(sum(unit.tokens for unit in part) for part in self._micro_batches(units))
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


class _Totals:
    """Sums over micro-batches, which leave the device once, together."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._names: list[str] = []
        self._sums: torch.Tensor | None = None

    def add(self, loss: torch.Tensor, measured: Mapping[str, torch.Tensor]) -> None:
        """Add what a method gave for a micro-batch; it measures the same each time."""
        self._names = list(measured)
        values = torch.stack((loss.float(), *(one.detach().float() for one in measured.values())))
        values = values.to(self._device, self._dtype)
        self._sums = values if self._sums is None else self._sums + values

    def means(self, weight: float, *more: torch.Tensor) -> tuple[float, dict[str, float], float]:
        """Return loss and measures, each divided by `weight`, and `more` as it is (0.0 without)."""
        assert self._sums is not None
        extra = [one.to(self._device, self._dtype)[None] for one in more] or [self._sums.new_zeros(1)]
        loss, *sums, last = torch.cat((self._sums, *extra)).tolist()
        return loss / weight, {name: one / weight for name, one in zip(self._names, sums, strict=True)}, last
