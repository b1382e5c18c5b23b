"""What each family's real template must teach, conversation by conversation, or why the line is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from rose.errors import InvalidDataset
from rose.language_models.template import ChatTemplate
from tests.real_templates.conversations import (
    Learned,
    Message,
    answer,
    call,
    learned,
    marks,
    render,
    result,
    system,
    text,
    tool,
    user,
)

pytestmark = pytest.mark.real_templates

Templates = Callable[[str], ChatTemplate]

S, S2 = system("Be very brief."), system("Be long.")
Q, Q2 = user("Two and two?"), user("And three?")
FOUR, SEVEN = "Four, of course.", "Seven, if added."
A, B, N = answer(FOUR), answer(SEVEN), answer("Anything else today?")
T, T2 = "Two plus two.", "Four plus three."
TA, T2B = answer(FOUR, reasoning_content=T), answer(SEVEN, reasoning_content=T2)
WRITTEN_TA = answer(f"<think>\n{T}\n</think>\n\n{FOUR}")
ROME = call("get_weather", '{"city": "Rome"}')
PARIS = call("get_weather", '{"city": "Paris"}', "call_2")
C, XC = answer(None, tool_calls=[ROME]), answer("Let me look it up.", tool_calls=[ROME])
TC = answer(None, tool_calls=[ROME], reasoning_content=T)
TWO_CALLS = answer(None, tool_calls=[ROME, PARIS])
R, Z = result("17 degrees, sunny"), answer("It is sunny in Rome.")
T2Z = answer("It is sunny in Rome.", reasoning_content=T2)
TOOLS = [tool("get_weather", city={"type": "string"})]

HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
CLOSED = "<think>\n\n</think>\n\n"
DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
    '```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜><｜end▁of▁sentence｜>'
)
GLM_CALL = (
    f"\n<think>{T}</think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
    "</tool_call><|observation|>"
)
QWEN35_CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call><|im_end|>"
)
NEMO_CALL = '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Rome"}, "id": "74196fe72"}]</s>'
LLAMA_CALL = '{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>'
GPT_OSS_CALL = ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'
KIMI_CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)


class Case(NamedTuple):
    family: str
    messages: list[Message]
    learned: list[str]
    """The learned text of each answer, marks written out."""
    sequences: int = 1
    tools: list[dict[str, Any]] | None = None
    behind: list[str] | None = None
    """How the text before each answer ends."""
    marks: list[str] | None = None
    """The marks among all that is learned, where not everything that looks like one is."""


CASES = {
    "1": Case("qwen2_5", [S, Q, A, Q2, B], [f"{FOUR}<|im_end|>", f"{SEVEN}<|im_end|>"]),
    "2": Case("qwen2_5", [Q, A, N], [f"{FOUR}<|im_end|>", "Anything else today?<|im_end|>"]),
    "3": Case("qwen2_5", [Q, answer("\n    print(4)\n")], ["\n    print(4)\n<|im_end|>"]),
    "4": Case("qwen2_5", [Q, C, R, Z], [f"{HERMES}<|im_end|>", "It is sunny in Rome.<|im_end|>"], tools=TOOLS),
    "5": Case("qwen2_5", [Q, XC], [f"Let me look it up.\n{HERMES}<|im_end|>"], tools=TOOLS),
    "6": Case("qwen2_5", [Q, WRITTEN_TA], [f"<think>\n{T}\n</think>\n\n{FOUR}<|im_end|>"], marks=["<|im_end|>"]),
    "6-field": Case("qwen2_5", [Q, TA], [f"<think>\n{T}\n</think>\n\n{FOUR}<|im_end|>"], marks=["<|im_end|>"]),
    "7": Case(
        "qwen2_5",
        [Q, answer(FOUR, weight=1), Q2, answer(SEVEN, weight=0), Q, answer(FOUR, weight=1)],
        [f"{FOUR}<|im_end|>", f"{FOUR}<|im_end|>"],
    ),
    "8": Case("qwen3", [Q, A], [f"{FOUR}<|im_end|>"], behind=[f"<|im_start|>assistant\n{CLOSED}"]),
    "8-first": Case("qwen3_first", [Q, A], [f"{FOUR}<|im_end|>"], behind=[f"<|im_start|>assistant\n{CLOSED}"]),
    "9": Case(
        "qwen3",
        [Q, A, Q2, B],
        [f"{FOUR}<|im_end|>", f"{SEVEN}<|im_end|>"],
        2,
        behind=[f"<|im_start|>assistant\n{CLOSED}"] * 2,
    ),
    "10": Case("qwen3", [Q, A, N], [f"{FOUR}<|im_end|>", "Anything else today?<|im_end|>"]),
    "11": Case("qwen3", [Q, WRITTEN_TA], [f"<think>\n{T}\n</think>\n\n{FOUR}<|im_end|>"], behind=["assistant\n"]),
    "11-field": Case("qwen3", [Q, TA], [f"<think>\n{T}\n</think>\n\n{FOUR}<|im_end|>"], behind=["assistant\n"]),
    "11-short": Case(
        "qwen3", [Q, answer(f"<think>\n{T}\n</think>\n\nFour.")], [f"<think>\n{T}\n</think>\n\nFour.<|im_end|>"]
    ),
    "12": Case(
        "qwen3",
        [Q, TA, Q2, T2B],
        [f"<think>\n{T}\n</think>\n\n{FOUR}<|im_end|>", f"<think>\n{T2}\n</think>\n\n{SEVEN}<|im_end|>"],
        2,
        behind=[
            "<|im_start|>assistant\n",
            f"assistant\n{FOUR}<|im_end|>\n<|im_start|>user\nAnd three?<|im_end|>\n<|im_start|>assistant\n",
        ],
    ),
    "13": Case(
        "qwen3",
        [Q, TA, Q2, B],
        [f"<think>\n{T}\n</think>\n\n{FOUR}<|im_end|>", f"{CLOSED}{SEVEN}<|im_end|>"],
        2,
        behind=["<|im_start|>assistant\n"] * 2,
    ),
    "14": Case(
        "qwen3",
        [Q, TC, R, T2Z],
        [
            f"<think>\n{T}\n</think>\n\n{HERMES}<|im_end|>",
            f"<think>\n{T2}\n</think>\n\nIt is sunny in Rome.<|im_end|>",
        ],
        tools=TOOLS,
    ),
    "15": Case(
        "qwen3",
        [Q, answer("The tag <think> opens, </think> closes.")],
        ["The tag <think> opens, </think> closes.<|im_end|>"],
        marks=["<|im_end|>"],
    ),
    "16": Case(
        "qwen3_5",
        [Q, TA, Q2, B],
        [f"{T}\n</think>\n\n{FOUR}<|im_end|>", f"\n</think>\n\n{SEVEN}<|im_end|>"],
        2,
        behind=["<|im_start|>assistant\n<think>\n"] * 2,
    ),
    "17": Case("qwen3_5", [Q, C], [QWEN35_CALL], tools=TOOLS),
    "19": Case("llama3_base", [Q, A, Q2, B], [f"{FOUR}<|eot_id|>", f"{SEVEN}<|eot_id|>"]),
    "20": Case("llama3_1", [Q, C, R, Z], [LLAMA_CALL, "It is sunny in Rome.<|eot_id|>"], tools=TOOLS),
    "22": Case(
        "gemma3",
        [S, Q, A],
        [f"{FOUR}<end_of_turn>"],
        behind=[
            "<bos><start_of_turn>user\nBe very brief.\n\nTwo and two?<end_of_turn>\n<start_of_turn>model\n",
        ],
    ),
    "24": Case(
        "mistral_nemo",
        [S, Q, A, Q2, B],
        [f"{FOUR}</s>", f"{SEVEN}</s>"],
        2,
        behind=["<s>[INST]Be very brief.\n\nTwo and two?[/INST]", "[INST]Be very brief.\n\nAnd three?[/INST]"],
    ),
    "25": Case("mistral_nemo", [Q, C, R, Z], [NEMO_CALL, "It is sunny in Rome.</s>"], tools=TOOLS),
    "27-one": Case("mistral_reference", [Q, A], [f"{FOUR}</s>"]),
    "28": Case("phi3", [Q, A, Q2, B], [f"{FOUR}<|end|>", f"{SEVEN}<|end|>"]),
    "29": Case("deepseek_v3", [Q, C, R, Z], [DEEPSEEK_CALL, "It is sunny in Rome.<｜end▁of▁sentence｜>"], 2),
    "30": Case(
        "r1_distill",
        [Q, answer("<b>Four</b>, of course.")],
        ["\n</think>\n\n<b>Four</b>, of course.<｜end▁of▁sentence｜>"],
        behind=["<｜Assistant｜><think>\n"],
    ),
    "31": Case("r1_distill", [Q, TA], [f"{T}\n</think>\n\n{FOUR}<｜end▁of▁sentence｜>"]),
    "31-written": Case("r1_distill", [Q, WRITTEN_TA], [f"{T}\n</think>\n\n{FOUR}<｜end▁of▁sentence｜>"]),
    "31-short": Case(
        "r1_distill",
        [Q, answer("Four.", reasoning_content=T)],
        [f"{T}\n</think>\n\nFour.<｜end▁of▁sentence｜>"],
        behind=["<｜Assistant｜><think>\n"],
    ),
    "33": Case("glm4_5", [Q, A, Q2, B], [f"\n{FOUR}<|user|>", f"\n{SEVEN}<|user|>"]),
    "34": Case("glm4_5", [Q, TC, R, Z], [GLM_CALL, "\n<think></think>\nIt is sunny in Rome.<|user|>"], tools=TOOLS),
    "35": Case(
        "gpt_oss",
        [Q, A, Q2, B],
        [
            f"<|channel|>final<|message|>{FOUR}<|return|>",
            f"<|channel|>final<|message|>{SEVEN}<|return|>",
        ],
        2,
        behind=[
            "<|start|>user<|message|>Two and two?<|end|><|start|>assistant",
            f"final<|message|>{FOUR}<|end|><|start|>user<|message|>And three?<|end|><|start|>assistant",
        ],
    ),
    "36": Case(
        "gpt_oss",
        [Q, TA],
        [f"<|channel|>analysis<|message|>{T}<|end|><|start|>assistant<|channel|>final<|message|>{FOUR}<|return|>"],
    ),
    "37-one": Case("gpt_oss", [Q, C], [GPT_OSS_CALL], tools=TOOLS),
    # More families, each for a trait that no other has.
    "two end marks": Case("cohere2", [Q, A], [f"{FOUR}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"]),
    "a thought never rendered": Case(
        "kimi_k2_5", [Q, TA], [f"{T}</think>{FOUR}<|im_end|>"], behind=["<|im_middle|><think>"]
    ),
    "a thought closed at once": Case(
        "glm4_7", [Q, TA], [f"{T}</think>{FOUR}<|user|>"], behind=["<|assistant|><think>"]
    ),
    "a thought always opened": Case("minimax_m2", [Q, A], [f"\n</think>\n\n{FOUR}[e~["], behind=["]~b]ai\n<think>\n"]),
    "a thought in a channel": Case("gemma4", [Q, TA], [f"<|channel>thought\n{T}\n<channel|>{FOUR}<turn|>"]),
    "a thought in its own tags": Case("seed_oss", [Q, TA], [f"<seed:think>{T}</seed:think>\n{FOUR}<seed:eos>"]),
    "a call in Python": Case(
        "lfm2", [Q, C], ["<|tool_call_start|>[get_weather(city='Rome')]<|tool_call_end|><|im_end|>"], tools=TOOLS
    ),
    "a call by its number": Case("kimi_k2_5", [Q, C], [KIMI_CALL], tools=TOOLS),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_exactly_this_is_learned(template: Templates, case: Case) -> None:
    family = template(case.family)
    rendering = render(family, case.messages, case.tools)
    found = learned(rendering)
    assert [text(family, one.ids) for one in found] == case.learned
    assert len(rendering.examples) == case.sequences
    expected = case.marks if case.marks is not None else _marks_in(family, "".join(case.learned))
    assert [mark for one in found for mark in marks(family, one.ids)] == expected
    if case.behind is not None:
        assert all(_before(family, one).endswith(end) for one, end in zip(found, case.behind, strict=True))


def _marks_in(family: ChatTemplate, written: str) -> list[str]:
    ids = family.tokenizer(written, add_special_tokens=False)["input_ids"]
    return marks(family, ids)


def _before(family: ChatTemplate, one: Learned) -> str:
    return text(family, one.before)


class Refusal(NamedTuple):
    family: str
    messages: list[Message]
    sentence: str
    """Pattern that the reason matches."""
    message: int | None
    """The message it names, from 1."""
    tools: list[dict[str, Any]] | None = None


NO_TOOLS = "has no place for tools"
REFUSALS = {
    "18": Refusal("llama3", [Q, C], r'leaves out the tool call "get_weather"', 2),
    "21-text": Refusal("llama3_1", [Q, XC], "leaves out the text beside the tool call", 2, TOOLS),
    "21-calls": Refusal("llama3_1", [Q, TWO_CALLS], "only supports single tool-calls at once", None, TOOLS),
    "23": Refusal("gemma3", [Q, C], NO_TOOLS, None, TOOLS),
    "23-answers": Refusal("gemma3", [Q, A, N], "Conversation roles must alternate", None),
    "23-result": Refusal("gemma3", [Q, C, R, Z], "Conversation roles must alternate", None),
    "26": Refusal("mistral_nemo", [S, Q, C, R, Z], "leaves out the system message", 1, TOOLS),
    "27": Refusal("mistral_reference", [Q, A, N], "asked for this answer otherwise", 3),
    "32": Refusal("r1_distill", [S, Q, A, S2, Q2, B], "leaves out the system message", 1),
    "a thought behind the call": Refusal("gemma4_first", [Q, TC], "puts the thought behind", 2, TOOLS),
    "37": Refusal("gpt_oss", [Q, TWO_CALLS], r'leaves out the tool call "get_weather" \(number 2\)', 2, TOOLS),
    **{
        f"38-{family}-{name}": Refusal(family, messages, NO_TOOLS, None, TOOLS)
        for family in ("zephyr", "smollm2")
        for name, messages in {"call": [Q, C], "result": [Q, C, R, Z], "listed": [S, Q, A]}.items()
    },
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=list(REFUSALS))
def test_the_line_is_refused_with_the_reason(template: Templates, case: Refusal) -> None:
    with pytest.raises(InvalidDataset) as refused:
        render(template(case.family), case.messages, case.tools)
    where = "Example 3" + ("" if case.message is None else f", message {case.message}") + " (line 7): "
    assert refused.value.message.startswith(where)
    assert re.search(case.sentence, refused.value.message)
    assert refused.value.code == "invalid_training_file"


@pytest.mark.parametrize(
    ("family", "messages"), [("qwen2_5", CASES["3"].messages), ("r1_distill", CASES["30"].messages)]
)
def test_the_first_token_is_made_alone(template: Templates, family: str, messages: list[Message]) -> None:
    """The prompt ends with a line end, the answer begins with one: they are never one token."""
    chosen = template(family)
    [one] = learned(render(chosen, messages))
    assert text(chosen, one.ids[:1]) == "\n"
    assert text(chosen, one.before[-1:]) == "\n"


def test_an_answer_that_is_not_learned_is_context(template: Templates) -> None:
    family = template("qwen2_5")
    *_, last = learned(render(family, CASES["7"].messages))
    assert f"<|im_start|>assistant\n{SEVEN}<|im_end|>" in _before(family, last)


@pytest.mark.parametrize("number", ["9", "12"])
def test_an_earlier_answer_is_read_without_its_thought(template: Templates, number: str) -> None:
    family = template("qwen3")
    _, second = learned(render(family, CASES[number].messages))
    before = _before(family, second)
    assert T not in before
    assert f"<|im_start|>assistant\n{FOUR}<|im_end|>\n" in before


def test_mistrals_reference_learns_the_blank_before_the_answer(template: Templates) -> None:
    family = template("mistral_reference")
    [one] = learned(render(family, CASES["27-one"].messages))
    assert family.tokenizer.convert_ids_to_tokens(one.ids)[0] == "▁Four"


def test_phi3_never_learns_the_mark_that_closes_the_conversation(template: Templates) -> None:
    family = template("phi3")
    closing = family.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    rendering = render(family, CASES["28"].messages)
    assert all(closing not in one.ids for one in learned(rendering))
