"""What the engine answers, judged by transformers' generate and by PEFT."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.lfm2 import Lfm2Config

from rose.inference.engine import TorchEngine
from rose.inference.generation import Done, Failed, Piece, Scored, ScoringRequest, Text
from rose.language_models.locate import describe
from rose.language_models.tiny import build_fixture
from tests.inference.asking import QUESTION, Listener, World, ask, make_adapter, refusal, reply

# PEFT 0.21 asks transformers 5.23 by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def judged(world: World, adapter: Any = None, tokens: int = 24, messages: Sequence[Any] = QUESTION) -> str:
    """Return what transformers itself (with PEFT) answers, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(world.folder)
    model: Any = AutoModelForCausalLM.from_pretrained(world.folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(world.blobs.path(adapter.path)))
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        made = model.generate(**ids, do_sample=False, max_new_tokens=tokens)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_greedy_is_what_transformers_generates(engine: TorchEngine, world: World) -> None:
    answer = reply(engine, ask(world.target()))
    assert answer.text() == judged(world)
    assert answer.reason() == "length"
    assert answer.done.completion_tokens == 24
    tokenizer = AutoTokenizer.from_pretrained(world.folder)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert answer.done.prompt_tokens == answer.prompt_tokens == len(prompt)


def test_a_prompt_longer_than_one_step_and_an_answer_longer_than_the_first_cache(
    engine: TorchEngine, world: World
) -> None:
    messages = [{"role": "user", "content": "Roses are red, violets are blue. " * 60}]
    answer = reply(engine, ask(world.target(), messages=messages, max_tokens=200))
    assert answer.prompt_tokens > 600
    assert answer.text() == judged(world, tokens=200, messages=messages)


def test_each_adapter_answers_as_peft_does_and_the_base_stays_as_it_was(engine: TorchEngine, world: World) -> None:
    before = reply(engine, ask(world.target(), logprobs=True))
    red = reply(engine, ask(world.target(world.red))).text()
    white = reply(engine, ask(world.target(world.white))).text()
    after = reply(engine, ask(world.target(), logprobs=True))
    assert red == judged(world, world.red)
    assert white == judged(world, world.white)
    assert len({before.text(), red, white}) == 3
    assert before.logprobs() == after.logprobs()  # bit for bit


def test_requests_for_two_adapters_and_the_base_at_once_answer_as_each_alone(engine: TorchEngine, world: World) -> None:
    asked = [
        ask(world.target(adapter), temperature=temperature, seed=seed, max_tokens=40)
        for adapter in (None, world.red, world.white)
        for temperature, seed in ((0, 1), (1, 2), (1, 3))
    ]
    alone = [reply(engine, request).text() for request in asked]
    together = [Listener(engine, request) for request in asked]
    assert [listener.all().text() for listener in together] == alone


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_other_architectures_answer_as_transformers_generates(
    start_engine: Callable[..., TorchEngine], world: World, tmp_path: Path, architecture: Any
) -> None:
    folder = build_fixture(tmp_path / architecture, architecture)
    base = describe(folder, source=str(folder), revision=None).base_model()
    other = msgspec.structs.replace(world, folder=folder, base=base)
    red = make_adapter(folder, world.blobs, base, seed=len(architecture) + 20)
    engine = start_engine()
    assert reply(engine, ask(other.target())).text() == judged(other)
    assert reply(engine, ask(other.target(red))).text() == judged(other, red)


def test_a_full_model_answers_by_itself(engine: TorchEngine, world: World) -> None:
    answer = reply(engine, ask(world.target(world.full, kind="full")))
    assert answer.text() == judged(world)


def test_requests_take_turns_token_by_token(start_engine: Callable[..., TorchEngine], world: World) -> None:
    submitted = threading.Event()
    engine = start_engine(before_step=lambda: submitted.wait(30))
    order: list[int] = []
    ended = [threading.Event(), threading.Event()]

    def sink(number: int, piece: Piece) -> None:
        if isinstance(piece, Text):
            order.append(number)
        if isinstance(piece, (Done, Failed)):
            ended[number].set()

    for number in (0, 1):
        engine.submit(ask(world.target(), max_tokens=60), partial(sink, number))
    submitted.set()
    assert all(event.wait(60) for event in ended)
    turns = sum(one != other for one, other in pairwise(order))
    assert turns > 60, order


def test_choices_differ_and_are_complete(engine: TorchEngine, world: World) -> None:
    answer = reply(engine, ask(world.target(world.red), n=4, temperature=1, seed=7, max_tokens=30))
    texts = [answer.text(index) for index in range(4)]
    assert len(set(texts)) == 4
    assert [answer.reason(index) for index in range(4)] == ["length"] * 4
    assert answer.done.completion_tokens == 4 * 30
    again = reply(engine, ask(world.target(world.red), n=4, temperature=1, seed=7, max_tokens=30))
    assert [again.text(index) for index in range(4)] == texts


def test_choices_that_end_early_leave_the_others_unchanged(engine: TorchEngine, world: World) -> None:
    """With a stop string that some choices reach, the remaining rows of the cache must stay with their choices."""
    asked: dict[str, Any] = {"n": 4, "temperature": 1, "seed": 11, "max_tokens": 40}
    free = reply(engine, ask(world.target(), **asked))
    stop = free.text(1)[8:10]
    stopped = reply(engine, ask(world.target(), **asked, stop=[stop]))
    assert stopped.reason(1) == "stop"
    for index in range(4):
        expected, found, _ = free.text(index).partition(stop)
        assert stopped.text(index) == expected
        assert stopped.reason(index) == ("stop" if found else "length")


def test_choices_of_a_model_that_keeps_states_beside_keys(
    start_engine: Callable[..., TorchEngine], world: World, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(world.folder, tmp_path / "lfm2"))
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=1024,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    base = describe(folder, source=str(folder), revision=None).base_model()
    target = msgspec.structs.replace(world, folder=folder, base=base).target()
    engine = start_engine()
    asked: dict[str, Any] = {"temperature": 1, "seed": 7, "max_tokens": 12}
    free = reply(engine, ask(target, n=3, **asked))
    assert free.text(0) == reply(engine, ask(target, **asked)).text()
    stopped = reply(engine, ask(target, n=3, stop=[free.text(0)[2:5]], **asked))
    assert [stopped.text(index) for index in (0, 1, 2)] == [free.text(0)[:2], free.text(1), free.text(2)]


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}])
def test_the_same_seed_makes_the_same_text(engine: TorchEngine, world: World, sampling: dict[str, float]) -> None:
    def once(seed: int | None) -> str:
        return reply(engine, ask(world.target(), seed=seed, **sampling)).text()

    seeds = [5, 6, -5, *range(100, 110)]  # several: two seeds may draw the same text, where few tokens are likely
    texts = [once(seed) for seed in seeds]
    assert [once(seed) for seed in seeds] == texts
    assert len(set(texts)) > 1
    assert len({once(None) for _ in range(12)}) > 1


def test_max_tokens(engine: TorchEngine, world: World) -> None:
    whole = reply(engine, ask(world.target(), max_tokens=9))
    for limit in (1, 5):
        answer = reply(engine, ask(world.target(), max_completion_tokens=limit))
        assert (answer.reason(), answer.done.completion_tokens) == ("length", limit)
        assert whole.text().startswith(answer.text().rstrip("\ufffd"))
    nothing = reply(engine, ask(world.target(), max_tokens=0, n=2))
    assert (nothing.text(), nothing.reason(0), nothing.reason(1)) == ("", "length", "length")
    assert nothing.done.completion_tokens == 0
    assert nothing.prompt_tokens > 0


def test_every_stop_string_inside_the_answer_ends_it_there(engine: TorchEngine, world: World) -> None:
    """Cuts of two characters at every place: most of them lie across the border of two tokens."""
    answer = reply(engine, ask(world.target()))
    text = answer.text()
    assert len(answer.texts()) > 10
    for start in range(0, len(text) - 2, 3):
        stop = text[start : start + 2]
        stopped = reply(engine, ask(world.target(), stop=stop))
        assert stopped.text() == text.partition(stop)[0]
        assert stopped.reason() == "stop"


def test_of_several_stop_strings_the_first_in_the_text_counts(engine: TorchEngine, world: World) -> None:
    text = reply(engine, ask(world.target())).text()
    stops = [text[20:23], text[10:13], "never in the text"]
    assert reply(engine, ask(world.target(), stop=stops)).text() == text[: min(text.find(stop) for stop in stops[:2])]


def test_the_end_of_turn_token_ends_an_answer_and_is_not_shown(engine: TorchEngine, world: World) -> None:
    end = AutoTokenizer.from_pretrained(world.folder).convert_tokens_to_ids("<|im_end|>")
    answer = reply(engine, ask(world.target(), logit_bias={str(end): 100}, logprobs=True))
    assert (answer.text(), answer.reason()) == ("", "stop")
    assert answer.done.completion_tokens == 1
    assert answer.logprobs() == []


def test_a_banned_token_is_not_made_and_a_forced_one_is(engine: TorchEngine, world: World) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.folder)
    (word,) = tokenizer.encode("a")
    assert reply(engine, ask(world.target(), max_tokens=3, logit_bias={str(word): 100})).text() == "aaa"
    everything_else = {str(token_id): -100 for token_id in range(len(tokenizer)) if token_id != word}
    assert reply(engine, ask(world.target(), max_tokens=3, logit_bias=everything_else)).text() == "aaa"
    assert (
        "a"
        not in reply(engine, ask(world.target(), max_tokens=60, temperature=2, logit_bias={str(word): -100})).texts()
    )


def test_penalties_make_a_repeating_answer_vary(engine: TorchEngine, world: World) -> None:
    plain = reply(engine, ask(world.target(), max_tokens=60, logprobs=True)).logprobs()
    punished = reply(engine, ask(world.target(), max_tokens=60, logprobs=True, frequency_penalty=2, presence_penalty=2))
    kinds = {entry.token for entry in punished.logprobs()}
    assert len(kinds) > len({entry.token for entry in plain})


def test_logprobs_are_the_models_own(engine: TorchEngine, world: World) -> None:
    answer = reply(engine, ask(world.target(), logprobs=True, top_logprobs=3, temperature=1, seed=1, max_tokens=12))
    tokenizer = AutoTokenizer.from_pretrained(world.folder)
    model: Any = AutoModelForCausalLM.from_pretrained(world.folder)
    ids: list[int] = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert len(answer.logprobs()) == 12
    for entry in answer.logprobs():
        with torch.inference_mode():
            expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], dim=0)
        assert [top.logprob for top in entry.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-3)
        token_id = int((expected - entry.logprob).abs().argmin())
        assert tokenizer.decode([token_id]) == entry.token
        ids.append(token_id)
    assert all(entry.bytes is not None for entry in answer.logprobs())
    shown = b"".join(bytes(entry.bytes or []) for entry in answer.logprobs()).decode(errors="replace")
    assert shown == answer.text()


def test_a_prompt_beyond_the_context_is_refused_and_names_the_numbers(engine: TorchEngine, world: World) -> None:
    error = refusal(engine, ask(world.target(), messages=[{"role": "user", "content": "rose " * 2500}]))
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "messages")
    assert "2048" in error.message


def test_an_answer_ends_where_the_context_ends(engine: TorchEngine, world: World) -> None:
    messages = [{"role": "user", "content": "rose " * 990}]
    answer = reply(engine, ask(world.target(), messages=messages, max_tokens=5000))
    assert answer.reason() == "length"
    assert answer.prompt_tokens + answer.done.completion_tokens == 2048


def test_an_unknown_token_in_logit_bias_is_refused(engine: TorchEngine, world: World) -> None:
    assert refusal(engine, ask(world.target(), logit_bias={"5000": 1})).param == "logit_bias"


def test_scoring_gives_the_log_probabilities_of_given_tokens(engine: TorchEngine, world: World) -> None:
    rows = [[5, 9, 200, 17, 3], [7, 8], list(range(10, 900))]
    told: queue.SimpleQueue[Scored | Failed] = queue.SimpleQueue()
    engine.score(ScoringRequest(target=world.target(world.red), rows=rows), told.put)
    scored = told.get(timeout=60)
    assert isinstance(scored, Scored)
    plain: Any = AutoModelForCausalLM.from_pretrained(world.folder)
    model: Any = PeftModel.from_pretrained(plain, str(world.blobs.path(world.red.path)))
    for row, found in zip(rows, scored.logprobs, strict=True):
        ids = torch.tensor([row])
        with torch.inference_mode():
            expected = torch.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
        expected = expected.gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)


def test_rows_that_cannot_be_scored_are_refused_by_number(engine: TorchEngine, world: World) -> None:
    told: queue.SimpleQueue[Scored | Failed] = queue.SimpleQueue()
    for row in ([1], [1, 1 << 40], [-1, 2]):
        engine.score(ScoringRequest(target=world.target(), rows=[[1, 2], row]), told.put)
        refused = told.get(timeout=60)
        assert isinstance(refused, Failed)
        assert "Row 1 must have" in refused.error.message
