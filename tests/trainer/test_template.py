"""Rendering: what is learned is what is asked, for templates with each of the known traps. Needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rose.domain.training_data import ChatExample
from rose.errors import InvalidDataset, InvalidRequest
from rose.language_models.template import (
    ChatTemplate,
    Rendering,
    Tokenized,
    load_tokenizer,
)

# Traits of real templates, in few lines. ChatML is that of the fixture itself.
THINKING = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
"""As Qwen3: the last answer only carries a (here empty) thought."""
OPENED_THOUGHT = """
{%- for message in messages %}{{ '<|im_start|>' + message.role + ':' + message.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant:<think>\\n' }}{% endif %}"""
"""As DeepSeek-R1's distillates: the prompt opens a thought that a rendered answer does not have."""
DEFAULT_SYSTEM = """
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""As Qwen2.5: a system message of its own where there is none."""
STRICT = """
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{{- '<|im_start|>' + ('model' if message.role == 'assistant' else 'user') + '\\n' }}
{{- message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"""
"""As Gemma: no system messages, turns alternate, content is trimmed."""
ENDLESS = """
{%- for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
"""No mark ends a turn."""
CLOSED = """
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ eos_token }}{% endif %}"""
"""As Phi-3: one more mark closes the whole conversation."""


DATED = """
{{- '<|im_start|>system\\nToday is ' + strftime_now('%-d %b %Y, %H:%M') + '.<|im_end|>\\n' }}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""As Llama 3.2 and Mistral Small: the date is told."""


@pytest.fixture
def tokenizer(fixture_base: Path) -> Any:
    return load_tokenizer(fixture_base)


def render_training(tokenizer: Any, example: ChatExample, maximum_tokens: int, **options: Any) -> Rendering:
    return ChatTemplate(tokenizer).render(example, maximum_tokens, **options)


def render_prompt(tokenizer: Any, messages: Any, tools: Any = None, **options: Any) -> list[int]:
    return ChatTemplate(tokenizer).prompt(messages, tools, **options)


def end_of_turn_ids(tokenizer: Any) -> frozenset[int]:
    return ChatTemplate(tokenizer).stop_ids


def chat(*turns: str, weights: dict[int, int] | None = None, tools: Any = None) -> ChatExample:
    """Make an example of `role: content` turns."""
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(turns):
        role, _, content = turn.partition(": ")
        messages.append({"role": role, "content": content})
        if weights and index in weights:
            messages[-1]["weight"] = weights[index]
    return ChatExample(line=7, number=3, messages=tuple(messages), tools=tools)


def learned(tokenizer: Any, example: Tokenized) -> list[str]:
    """Return the texts that are learned, one for each run of weighted tokens."""
    runs: list[list[int]] = []
    before = 0.0
    for token, weight in zip(example.ids, example.weights, strict=True):
        if weight:
            if not before:
                runs.append([])
            runs[-1].append(token)
        before = weight
    return [tokenizer.decode(run) for run in runs]


def text(tokenizer: Any, example: Tokenized) -> str:
    return tokenizer.decode(example.ids)


def asked(tokenizer: Any, example: ChatExample, answer_index: int) -> list[int]:
    return render_prompt(tokenizer, example.messages[:answer_index], example.tools)


def test_answers_are_learned_with_their_end_mark_and_nothing_else(tokenizer: Any) -> None:
    example = chat("system: Be short.", "user: Hi", "assistant: Hello.", "user: And?", "assistant: Bye.")
    rendering = render_training(tokenizer, example, 500)
    assert not rendering.cut
    (only,) = rendering.examples
    assert learned(tokenizer, only) == ["Hello.<|im_end|>", "Bye.<|im_end|>"]
    assert set(only.weights) == {0.0, 1.0}
    assert rendering.tokens == len(only.ids)


@pytest.mark.parametrize("template", [None, THINKING, OPENED_THOUGHT, DEFAULT_SYSTEM, STRICT, ENDLESS, CLOSED, DATED])
def test_the_learned_part_follows_exactly_what_is_asked(tokenizer: Any, template: str | None) -> None:
    if template:
        tokenizer.chat_template = template
    example = chat("user: One", "assistant: First answer", "user: Two", "assistant: Second answer")
    rendering = render_training(tokenizer, example, 500)
    found: list[str] = []
    for document in rendering.examples:
        for answer in (1, 3):
            prompt = asked(tokenizer, example, answer)
            if document.ids[: len(prompt)] == prompt and document.weights[len(prompt)]:
                assert not document.weights[len(prompt) - 1]
                end = next((i for i in range(len(prompt), len(document.ids)) if not document.weights[i]), None)
                found.append(tokenizer.decode(document.ids[len(prompt) : end]))
    closed = "\n</think>\n\n" if template == OPENED_THOUGHT else ""
    said = [answer.removesuffix("<|im_end|>").removeprefix(closed).strip() for answer in found]
    assert said == ["First answer", "Second answer"]
    assert all(answer.startswith(closed) for answer in found), "a thought that the prompt opened is closed"
    assert found[-1].endswith("<|im_end|>")


def test_a_template_that_renders_earlier_answers_differently_gives_one_sequence_per_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING
    rendering = render_training(tokenizer, chat("user: 1", "assistant: a", "user: 2", "assistant: b"), 500)
    assert [learned(tokenizer, document) for document in rendering.examples] == [["a<|im_end|>"], ["b<|im_end|>"]]
    single = render_training(tokenizer, chat("user: 1", "assistant: a"), 500)
    assert len(single.examples) == 1
    assert "<think>\n\n</think>" in text(tokenizer, single.examples[0])


def test_a_default_system_message_is_trained_and_asked_alike(tokenizer: Any) -> None:
    tokenizer.chat_template = DEFAULT_SYSTEM
    rendering = render_training(tokenizer, chat("user: 1", "assistant: a"), 500)
    assert "You are helpful." in text(tokenizer, rendering.examples[0])
    assert "You are helpful." in tokenizer.decode(render_prompt(tokenizer, [{"role": "user", "content": "1"}]))


def test_a_date_is_the_same_on_every_day(tokenizer: Any) -> None:
    tokenizer.chat_template = DATED
    rendering = render_training(tokenizer, chat("user: 1", "assistant: a"), 500)
    assert "Today is 26 Jul 2024, 00:00." in text(tokenizer, rendering.examples[0])


def test_a_template_that_is_none_is_no_model_that_can_be_asked(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if x %}"
    with pytest.raises(InvalidRequest, match="chat template cannot be read: Unexpected end of template") as caught:
        ChatTemplate(tokenizer)
    assert caught.value.code == "model_not_available"


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[0].content.encode('x') }}"])
def test_an_error_of_the_template_is_no_error_of_ours(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InvalidRequest, match="chat template refuses these messages"):
        render_prompt(tokenizer, [{"role": "user", "content": "1"}])


def test_weights_choose_the_answers(tokenizer: Any) -> None:
    example = chat("user: 1", "assistant: a", "user: 2", "assistant: b", weights={1: 0, 3: 1})
    (only,) = render_training(tokenizer, example, 500).examples
    assert learned(tokenizer, only) == ["b<|im_end|>"]
    example = chat("user: 1", "assistant: a", "user: 2", "assistant: b", weights={3: 0})
    (only,) = render_training(tokenizer, example, 500).examples
    assert learned(tokenizer, only) == ["a<|im_end|>"]
    assert "2" not in text(tokenizer, only), "what comes after the last learned answer changes nothing"


def test_no_answer_to_learn_is_refused_with_its_line(tokenizer: Any) -> None:
    with pytest.raises(InvalidDataset, match=r"Example 3 \(line 7\): no assistant message"):
        render_training(tokenizer, chat("user: 1", "assistant: a", weights={1: 0}), 500)


def test_a_refusing_template_is_named_with_the_line(tokenizer: Any) -> None:
    tokenizer.chat_template = STRICT
    with pytest.raises(InvalidDataset, match=r"line 7\): The model's chat template refuses .* Roles must alternate"):
        render_training(tokenizer, chat("user: 1", "user: 2", "assistant: a"), 500)
    with pytest.raises(InvalidRequest, match="Roles must alternate") as caught:
        render_prompt(tokenizer, [{"role": "user", "content": "1"}, {"role": "user", "content": "2"}])
    assert caught.value.param == "messages"


def test_a_system_message_stands_before_the_question_where_the_template_has_no_such_role(tokenizer: Any) -> None:
    tokenizer.chat_template = STRICT
    rendering = render_training(tokenizer, chat("system: Be brief.", "user: 1", "assistant: a"), 500)
    assert text(tokenizer, rendering.examples[0]) == (
        "<|im_start|>user\nBe brief.\n\n1<|im_end|>\n<|im_start|>model\na<|im_end|>\n"
    )
    assert [caveat.code for caveat in rendering.caveats] == ["system_in_front"]


def test_a_template_that_drops_the_answer_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(InvalidDataset, match="leaves out the answer"):
        render_training(tokenizer, chat("user: 1", "assistant: a"), 500)


def test_a_turn_without_end_mark_gets_one(tokenizer: Any) -> None:
    tokenizer.chat_template = ENDLESS
    (only,) = render_training(tokenizer, chat("user: 1", "assistant: a"), 500).examples
    assert text(tokenizer, only) == "user: 1\nassistant: a<|im_end|>"
    assert only.weights[-1] == 1.0


def test_a_mark_that_closes_the_conversation_is_not_learned(tokenizer: Any) -> None:
    tokenizer.chat_template = CLOSED
    tokenizer.eos_token = "<|endoftext|>"
    (only,) = render_training(tokenizer, chat("user: 1", "assistant: a"), 500).examples
    assert learned(tokenizer, only) == ["a<|im_end|>"]
    end, close = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert end_of_turn_ids(tokenizer) == {end, close}


def test_an_empty_answer_teaches_to_say_nothing(tokenizer: Any) -> None:
    (only,) = render_training(tokenizer, chat("user: 1", "assistant: "), 500).examples
    assert learned(tokenizer, only) == ["<|im_end|>"]


TURNS = ("system: Be short.", "user: first " + "x " * 40, "assistant: one", "user: second", "assistant: two")


def fits(tokenizer: Any, *turns: str) -> int:
    return len(render_training(tokenizer, chat(*turns), 10_000).examples[0].ids)


@pytest.mark.parametrize("template", [None, THINKING])
def test_the_oldest_whole_turns_go_first(tokenizer: Any, template: str | None) -> None:
    if template:
        tokenizer.chat_template = template
    limit = fits(tokenizer, *TURNS) - 1
    rendering = render_training(tokenizer, chat(*TURNS), limit)
    assert rendering.cut
    rest = text(tokenizer, rendering.examples[-1])
    assert "first" not in rest
    assert "Be short." in rest
    assert "second" in rest
    assert learned(tokenizer, rendering.examples[-1]) == ["two<|im_end|>"]
    assert all(len(document.ids) <= limit for document in rendering.examples)


def test_then_the_question_loses_its_beginning_and_the_answer_stays(tokenizer: Any) -> None:
    example = chat("system: Be short.", "user: Zebra " + "x " * 80 + "end?", "assistant: The answer.")
    rendering = render_training(tokenizer, example, 40)
    (only,) = rendering.examples
    assert rendering.cut
    assert len(only.ids) == 40
    rest = text(tokenizer, only)
    assert "Be short." in rest
    assert "Zebra" not in rest
    assert rest.rstrip().endswith("end?<|im_end|>\n<|im_start|>assistant\nThe answer.<|im_end|>")
    assert learned(tokenizer, only) == ["The answer.<|im_end|>"]


def test_an_answer_that_does_not_fit_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(InvalidDataset, match=r"line 7\): the answer alone has \d+ tokens; .* holds 20"):
        render_training(tokenizer, chat("user: a", "assistant: " + "word " * 60), 20)


def test_every_limit_either_keeps_the_whole_answer_or_is_refused(tokenizer: Any) -> None:
    example = chat(*TURNS)
    refused = [limit for limit in range(1, fits(tokenizer, *TURNS) + 2) if not _keeps(tokenizer, example, limit)]
    assert refused == list(range(1, refused[-1] + 1))
    assert refused[-1] < 20, "the marks around question and answer stay, and the answer"


def _keeps(tokenizer: Any, example: ChatExample, limit: int) -> bool:
    try:
        rendering = render_training(tokenizer, example, limit)
    except InvalidDataset:
        return False
    (only,) = rendering.examples
    assert len(only.ids) <= limit
    assert learned(tokenizer, only)[-1] == "two<|im_end|>"
    return True


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def tool_example() -> ChatExample:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"b": 1, "a": "x"}'}}
    return ChatExample(
        line=1,
        number=1,
        tools=(TOOL,),
        messages=(
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
            {"role": "assistant", "content": "It rains."},
        ),
    )


def test_tool_calls_are_learned_as_objects_in_their_order(tokenizer: Any) -> None:
    (only,) = render_training(tokenizer, tool_example(), 500).examples
    call, answer = learned(tokenizer, only)
    assert answer == "It rains.<|im_end|>"
    content = call.removeprefix("<tool_call>").removesuffix("</tool_call><|im_end|>")
    assert json.loads(content) == {"name": "weather", "arguments": {"b": 1, "a": "x"}}
    assert content.index('"b"') < content.index('"a"')
    assert '"name": "weather"' in text(tokenizer, only)


def test_old_function_calls_are_tool_calls(tokenizer: Any) -> None:
    old = ChatExample(
        line=1,
        number=1,
        messages=(
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "function_call": {"name": "weather", "arguments": "{}"}},
            {"role": "function", "name": "weather", "content": "rain"},
            {"role": "assistant", "content": "It rains."},
        ),
    )
    (only,) = render_training(tokenizer, old, 500).examples
    assert learned(tokenizer, only)[0].startswith('<tool_call>{"name": "weather"')


def test_a_beginning_mark_is_never_doubled(fixture_base: Path) -> None:
    tokenizer = load_tokenizer(fixture_base)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token + bos_token }}" + tokenizer.chat_template
    (only,) = render_training(tokenizer, chat("user: 1", "assistant: a"), 500).examples
    prompt = render_prompt(tokenizer, [{"role": "user", "content": "1"}])
    begin = tokenizer.bos_token_id
    assert only.ids[: len(prompt)] == prompt
    assert prompt[0] == begin != prompt[1]


def test_any_character_survives_and_is_learned(tokenizer: Any) -> None:
    answer = "Grüße 🌹 \u200b\t\n\n日本語 \x07 end"
    (only,) = render_training(tokenizer, chat("user: ?", f"assistant: {answer}"), 500).examples
    assert learned(tokenizer, only) == [answer + "<|im_end|>"]


def test_the_end_of_a_turn_is_known(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn_ids(tokenizer) == {end}
    tokenizer.eos_token = "<|endoftext|>"
    assert end_of_turn_ids(tokenizer) == {end, tokenizer.eos_token_id}
    tokenizer.chat_template = ENDLESS
    assert end_of_turn_ids(tokenizer) == {tokenizer.eos_token_id}


def test_a_model_without_chat_template_is_refused_with_what_to_do(fixture_base: Path, tmp_path: Path) -> None:
    for file in fixture_base.iterdir():
        if file.name not in ("chat_template.jinja", "model.safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InvalidRequest, match=r"no chat template.*instruct version") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.code == "model_not_available"
    for content in ("{", "[]"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(InvalidRequest, match="cannot be loaded"):
            load_tokenizer(tmp_path)


def test_rendering_needs_no_torch(fixture_base: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None  # as where it is not installed
from pathlib import Path
from rose.domain.training_data import ChatExample
from rose.language_models.template import load_template
messages = ({{"role": "user", "content": "1"}}, {{"role": "assistant", "content": "a"}})
example = ChatExample(line=1, number=1, messages=messages)
print(load_template(Path({str(fixture_base)!r})).render(example, 99).tokens)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert int(done.stdout) > 5


def test_a_rendering_counts_its_tokens() -> None:
    one = Tokenized(ids=[1, 2, 3], weights=[0.0, 1.0, 1.0])
    assert Rendering(examples=(one, one), cut=False).tokens == 6


def test_a_token_without_a_row_is_refused_with_both_numbers(tokenizer: Any) -> None:
    example = chat("user: 1", "assistant: é")
    (only,) = render_training(tokenizer, example, 500).examples
    largest = max(only.ids)
    assert ChatTemplate(tokenizer, rows=largest + 1).render(example, 500).examples == (only,)
    short = ChatTemplate(tokenizer, rows=largest)
    with pytest.raises(InvalidDataset, match=rf"line 7\): token .* has number {largest}; the model has {largest} rows"):
        short.render(example, 500)
    with pytest.raises(InvalidRequest, match=f"has number {largest}; the model has {largest} rows"):
        short.prompt([{"role": "user", "content": "é"}])


def test_a_tokenizer_whose_marks_have_no_rows_does_not_belong_to_the_weights(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    number = tokenizer.convert_tokens_to_ids("<|turn|>")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|turn|>")
    with pytest.raises(
        InvalidRequest, match=rf"'<\|turn\|>' is number {number}, the embedding has 1024 rows"
    ) as caught:
        ChatTemplate(tokenizer, rows=1024)
    assert caught.value.code == "model_not_available"


def test_a_thought_in_a_job_without_thinking_is_refused(tokenizer: Any) -> None:
    empty, own = (
        "loop.last %}{{ '<think>\\n\\n</think>",
        "loop.last %}{{ '<think>\\n' + message.reasoning_content + '\\n</think>",
    )
    tokenizer.chat_template = THINKING.replace(empty, own, 1)
    messages = ({"role": "user", "content": "1"}, {"role": "assistant", "content": "a", "reasoning_content": "Hm."})
    example = ChatExample(line=7, number=3, messages=messages)
    (only,) = render_training(tokenizer, example, 500, thinking=True).examples
    assert learned(tokenizer, only) == ["<think>\nHm.\n</think>\n\na<|im_end|>"]
    with pytest.raises(InvalidDataset, match=r"message 2 \(line 7\): has a thought, .* train with thinking on"):
        render_training(tokenizer, example, 500, thinking=False)
