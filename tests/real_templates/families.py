"""The families: whose vocabulary, whose template, which marks and stop tokens.

A family whose tokenizer is in no package has its own template over a stand-in: the first 24,000 entries of Qwen3's
vocabulary, a whole byte-pair tokenizer of that size, with the family's marks. Templates and marks are the real ones,
the numbers of the tokens are not.
"""

from __future__ import annotations

from typing import NamedTuple

STAND_IN = "stand_in"
STAND_IN_SIZE = 24_000

ZEPHYR = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
"""Zephyr's and TinyLlama's, in no package as a file."""


class Family(NamedTuple):
    vocabulary: str
    template: str = ""
    """`trl:NAME`, `xinference:NAME`, a template's text, or nothing: the one that comes with the vocabulary."""
    stops: tuple[str, ...] = ()
    """The tokens of generation_config.json."""
    marks: tuple[str, ...] = ()
    """Special tokens that the vocabulary lacks."""
    plain_marks: tuple[str, ...] = ()
    """The same, not special."""
    without: tuple[str, ...] = ()
    """Added tokens of the vocabulary that this family does not have."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Added tokens that this family calls otherwise."""
    begin: str | None = None
    end: str | None = None
    swallowing: bool = False
    """Whether the added marks take the blanks behind them."""


_QWEN = ("<|im_end|>", "<|endoftext|>")
_QWEN3_ONLY = ("<tool_response>", "</tool_response>", "<think>", "</think>")
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_THINK = ("<think>", "</think>")
_DEEPSEEK_END = "<｜end▁of▁sentence｜>"
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", _DEEPSEEK_END)
_DEEPSEEK_PLAIN = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    *_THINK,
)
_GLM = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_GLM_PLAIN = (*_THINK, *_TOOL_TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_PHI3 = (
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
)
_GEMMA4 = (
    *("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>"),
    *("<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
)
_COHERE = (
    *("<BOS_TOKEN>", "<EOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"),
    *("<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)
_LFM = (
    *("<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>"),
    *("<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>"),
)
_KIMI = (
    *("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>"),
    "<|tool_call_argument_begin|>",
)
_LLAMA3_STOPS = ("<|end_of_text|>", "<|eot_id|>")
_LLAMA31_NAMES = (("<|reserved_special_token_4|>", "<|eom_id|>"), ("<|reserved_special_token_5|>", "<|python_tag|>"))
_LLAMA31_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def _chatml(template: str, plain_marks: tuple[str, ...]) -> Family:
    return Family(STAND_IN, template, _QWEN, _CHATML, plain_marks, end="<|im_end|>")


def _glm(template: str) -> Family:
    stops = ("<|endoftext|>", "<|user|>", "<|observation|>")
    return Family(STAND_IN, template, stops, _GLM, _GLM_PLAIN, end="<|endoftext|>")


def _gemma4(template: str) -> Family:
    stops = ("<eos>", "<turn|>", "<|tool_response>")
    return Family(STAND_IN, template, stops, _GEMMA4, begin="<bos>", end="<eos>")


def _deepseek(vocabulary: str, template: str, without: tuple[str, ...] = ()) -> Family:
    begin, end = _DEEPSEEK
    return Family(vocabulary, template, (end,), _DEEPSEEK, _DEEPSEEK_PLAIN, without, begin=begin, end=end)


FAMILIES = {
    # The family's own tokenizer and template.
    "qwen2_5": Family("qwen3", "trl:qwen2_5", _QWEN, without=_QWEN3_ONLY),
    "qwen3": Family("qwen3", "trl:qwen3", _QWEN),
    "qwen3_first": Family("qwen3", stops=_QWEN),
    "qwen3_2507": Family("qwen3", "trl:qwen3_instruct_2507", _QWEN),
    "qwen3_coder": Family("qwen3", "xinference:Qwen3-Coder", _QWEN),
    "llama3": Family("llama3_1", stops=_LLAMA3_STOPS),
    "llama3_base": Family("llama3", stops=_LLAMA3_STOPS),
    "llama3_1": Family("llama3_1", "trl:llama3_1", _LLAMA31_STOPS, renamed=_LLAMA31_NAMES),
    "llama3_2": Family("llama3_1", "trl:llama3_2", _LLAMA31_STOPS, renamed=_LLAMA31_NAMES),
    "gemma3": Family("gemma3", stops=("<eos>", "<end_of_turn>")),
    "deepseek_v3": Family("deepseek_v3", stops=(_DEEPSEEK_END,)),
    "gpt_oss": Family("gptoss", "trl:gptoss", ("<|return|>", "<|endoftext|>", "<|call|>")),
    "mistral_nemo": Family("tekken", "xinference:mistral-nemo-instruct", ("</s>",)),
    "mistral_v3": Family("mistral", "xinference:mistral-instruct-v0.3", ("</s>",)),
    "mistral_reference": Family("mistral", stops=("</s>",)),
    "smollm2": Family("smollm2", stops=("<|im_end|>",)),
    # The family's vocabulary, its marks added.
    "phi3": Family(
        "llama2",
        "trl:phi3",
        ("<|endoftext|>", "<|assistant|>", "<|end|>"),
        _PHI3,
        begin="<s>",
        end="<|endoftext|>",
        swallowing=True,
    ),
    "zephyr": Family("llama2", ZEPHYR, ("</s>",)),
    "r1_distill": _deepseek(
        "qwen3", "trl:deepseek_r1_distill", (*_CHATML, *_QWEN3_ONLY, "<tool_call>", "</tool_call>")
    ),
    # The family's template and marks over the stand-in.
    "qwen3_5": _chatml("trl:qwen3_5_think", (*_THINK, *_TOOL_TAGS)),
    "qwen3_6": _chatml("trl:qwen3_6", (*_THINK, *_TOOL_TAGS)),
    "qwen3_8": _chatml("trl:qwen3_8", (*_THINK, *_TOOL_TAGS)),
    "qwq": _chatml("xinference:QwQ-32B", (*_THINK, *_TOOL_TAGS)),
    "nemotron_3": _chatml("trl:nemotron_3_nano", (*_THINK, *_TOOL_TAGS)),
    "gemma2": Family(
        STAND_IN,
        "trl:gemma",
        ("<eos>", "<end_of_turn>"),
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        begin="<bos>",
        end="<eos>",
    ),
    "gemma4": _gemma4("trl:gemma4_v5"),
    "gemma4_first": _gemma4("trl:gemma4_v2"),
    "glm4": _glm("xinference:glm4-0414"),
    "glm4_5": _glm("trl:glm4moe"),
    "glm4_7": _glm("xinference:GLM-4.7"),
    "deepseek_r1_0528": _deepseek(STAND_IN, "xinference:deepseek-r1-0528"),
    "cohere": Family(
        STAND_IN, "trl:cohere", ("<|END_OF_TURN_TOKEN|>",), _COHERE, begin="<BOS_TOKEN>", end="<|END_OF_TURN_TOKEN|>"
    ),
    "cohere2": Family(
        STAND_IN, "trl:cohere2", ("<|END_OF_TURN_TOKEN|>",), _COHERE, begin="<BOS_TOKEN>", end="<|END_OF_TURN_TOKEN|>"
    ),
    "lfm2": Family(STAND_IN, "trl:lfm2_v2", ("<|im_end|>",), _LFM, begin="<|startoftext|>", end="<|im_end|>"),
    "lfm2_5": Family(
        STAND_IN, "trl:lfm2_2_5_v2", ("<|im_end|>",), _LFM, _THINK, begin="<|startoftext|>", end="<|im_end|>"
    ),
    "kimi_k2_5": Family(
        STAND_IN, "xinference:Kimi-K2.5", ("[EOS]", "<|im_end|>"), _KIMI, _THINK, begin="[BOS]", end="[EOS]"
    ),
    "minimax_m2": Family(
        STAND_IN,
        "xinference:MiniMax-M2",
        ("[e~[",),
        ("]~!b[", "]~b]", "[e~["),
        (*_THINK, "<minimax:tool_call>", "</minimax:tool_call>"),
        begin="]~!b[",
        end="[e~[",
    ),
    "seed_oss": Family(
        STAND_IN,
        "xinference:seed-oss",
        ("<seed:eos>",),
        ("<seed:bos>", "<seed:pad>", "<seed:eos>"),
        ("<seed:think>", "</seed:think>", "<seed:tool_call>", "</seed:tool_call>"),
        begin="<seed:bos>",
        end="<seed:eos>",
    ),
}
