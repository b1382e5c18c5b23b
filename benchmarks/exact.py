"""Logits to the bit: each prompt answered alone, then all together, with arrivals and with adapters; fp16 against fp32.

Greedy answers of 64 tokens to 50 prompts, in this process, without HTTP. Two steps count as equal when `torch.equal`
says so of all their logits; fp16 weights are held against fp32 ones on the fp16 answers, token by token.

    python -m benchmarks exact --model smollm2
    python -m benchmarks exact --model fixture --prompts 6 --tokens 8 --dry
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.serving import publish
from benchmarks.serving_world import MODELS, World, build, question
from rose.domain.artifacts import Artifact
from rose.inference.batching import building
from rose.inference.batching.model import BatchedModel
from rose.inference.rows import Row
from rose.language_models.adapters import read_adapter
from rose.language_models.load import load_model
from rose.language_models.template import load_template

ADAPTERS = 8
CACHE_BYTES = 4 << 30
CONTEXT_TOKENS = 2048
APART = 3
"""Steps between one arrival and the next."""
COLUMNS = ("weights", "compared", "answers", "same texts", "same logits in every step", "largest |d logprob|")


class Answers:
    """The tokens and logits of all prompts."""

    def __init__(self, tokens: list[list[int]], logits: list[Tensor]) -> None:
        self.tokens = tokens
        self.logits = logits
        """Of each answer [tokens, V]."""


def answer(
    runner: BatchedModel, prompts: Sequence[list[int]], keys: Sequence[str | None], tokens: int, apart: int
) -> Answers:
    """Answer greedily; each row joins `apart` steps after the one before it, or as soon as there is room."""
    runner.forget_prompts()
    rows = [
        Row(prompt, adapter=key, most_tokens=len(prompt) + tokens) for prompt, key in zip(prompts, keys, strict=True)
    ]
    made: list[list[Tensor]] = [[] for _ in rows]
    coming, going, steps = list(range(len(rows))), list[int](), 0
    while coming or going:
        while coming and steps >= apart * coming[0] and runner.admit([rows[coming[0]]]):
            going.append(coming.pop(0))
        if going:
            for row, logits in zip(*runner.step([rows[number] for number in going]), strict=True):
                number = rows.index(row)
                made[number].append(logits.clone())
                row.tokens.append(int(logits.argmax()))
                if len(made[number]) == tokens:
                    going.remove(number)
                    runner.release(row)
        steps += 1
    return Answers([row.tokens[row.prompt_tokens :] for row in rows], [torch.stack(one) for one in made])


def one_by_one(runner: BatchedModel, prompts: Sequence[list[int]], keys: Sequence[str | None], tokens: int) -> Answers:
    """Answer each prompt while there is no other."""
    alone = [answer(runner, [prompt], [key], tokens, 0) for prompt, key in zip(prompts, keys, strict=True)]
    return Answers([one.tokens[0] for one in alone], [one.logits[0] for one in alone])


def line(form: str, what: str, mine: Answers, other: Answers) -> list[str]:
    """Compare two runs of the same prompts."""
    texts = sum(one == two for one, two in zip(mine.tokens, other.tokens, strict=True))
    pairs = list(zip(mine.logits, other.logits, strict=True))
    same = sum(torch.equal(one, two) for one, two in pairs)
    largest = max(_difference(one, two) for one, two in pairs)
    return [form, what, str(len(pairs)), str(texts), str(same), f"{largest:.1e}" if largest else "0"]


def _difference(one: Tensor, two: Tensor) -> float:
    return float((one.log_softmax(-1) - two.log_softmax(-1)).abs().max())


def replay(runner: BatchedModel, prompts: Sequence[list[int]], answers: Answers) -> Answers:
    """Return what the runner gives where another one wrote these answers."""
    runner.forget_prompts()
    texts = [prompt + tokens for prompt, tokens in zip(prompts, answers.tokens, strict=True)]
    logits = [building.play(runner, [text], [len(prompt)])[0] for text, prompt in zip(texts, prompts, strict=True)]
    return Answers([one.argmax(-1).tolist() for one in logits], logits)


class Trial:
    """The prompts, and the adapters that every second of them is answered with."""

    def __init__(self, world: World, given: argparse.Namespace) -> None:
        self._world, self._tokens = world, int(given.tokens)
        tokenizer = load_template(world.folder).tokenizer
        self.prompts: list[list[int]] = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question(number)}], add_generation_prompt=True, return_dict=False
            )
            for number in range(given.prompts)
        ]
        self._base: list[str | None] = [None] * len(self.prompts)
        adapters: list[Artifact] = world.adapters
        self._mixed = [adapters[n % len(adapters)].sha256 if n % 2 else None for n in range(len(self.prompts))]

    def runner(self, form: str) -> BatchedModel:
        """Load the base in this form, with the adapters."""
        model = load_model(self._world.folder)
        runner = building.build(model, form=form, limit_bytes=CACHE_BYTES, context_tokens=CONTEXT_TOKENS)
        for adapter in self._world.adapters:
            runner.add_adapter(adapter.sha256, read_adapter(self._world.adapter_folder(adapter), self._world.base))
        return runner

    def run(self, form: str) -> tuple[list[list[str]], Answers]:
        """Return the lines of one form of the weights, and the base's answers."""
        runner = self.runner(form)
        print(f"{form}: batch_invariant {runner.batch_invariant}", flush=True)
        alone = one_by_one(runner, self.prompts, self._base, self._tokens)
        table = [line(form, "alone, all together", alone, self._all(runner, self._base, 0))]
        table.append(line(form, "alone, with arrivals", alone, self._all(runner, self._base, APART)))
        adapted = [number for number, key in enumerate(self._mixed) if key]
        others = one_by_one(runner, [self.prompts[n] for n in adapted], [self._mixed[n] for n in adapted], self._tokens)
        mixed = Answers(list(alone.tokens), list(alone.logits))
        for place, number in enumerate(adapted):
            mixed.tokens[number], mixed.logits[number] = others.tokens[place], others.logits[place]
        what = f"alone, with arrivals, every second with one of {len(self._world.adapters)} adapters"
        table.append(line(form, what, mixed, self._all(runner, self._mixed, APART)))
        return table, alone

    def _all(self, runner: BatchedModel, keys: Sequence[str | None], apart: int) -> Answers:
        return answer(runner, self.prompts, keys, self._tokens, apart)

    def against(self, form: str, answers: Answers) -> Answers:
        """Return what the base gives in this form where `answers` were written."""
        return replay(self.runner(form), self.prompts, answers)


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks exact", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--label", default="")
    parser.add_argument("--dry", action="store_true", help="record nothing")
    given, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    trial = Trial(build(given.model, ADAPTERS), given)
    table, half = trial.run("fp16")
    gc.collect()
    more, full = trial.run("fp32")
    table += more
    same = sum(one == two for one, two in zip(half.tokens, full.tokens, strict=True))
    replayed = trial.against("fp32", half)
    largest = max(_difference(one, two) for one, two in zip(half.logits, replayed.logits, strict=True))
    table.append(["fp16, fp32", "the base alone", str(len(trial.prompts)), str(same), "", f"{largest:.1e}"])
    what = f"{(__doc__ or '').splitlines()[0]} Model {given.model}, {given.tokens} tokens each."
    publish(given, "exact", what, COLUMNS, table)


if __name__ == "__main__":
    main()
