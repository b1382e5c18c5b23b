"""Graders without a server: reading them, templates, formulas, checks, and how a model's answer is read."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rose.errors import InvalidRequest
from rose.graders import model_graders, reading, templates
from rose.graders.formula import Formula, FormulaError, is_name
from rose.graders.grading import string_check
from rose.graders.kinds import LabelModel, Multi, ScoreModel
from rose.graders.model_graders import ModelAnswer
from rose.graders.results import Fault, Usage

CHECK = {"type": "string_check", "name": "a", "input": "{{item.x}}", "reference": "b", "operation": "eq"}
SCORE = {"type": "score_model", "name": "m", "model": "tiny", "input": [{"role": "user", "content": "Good?"}]}
LABEL = {**SCORE, "type": "label_model", "labels": ["good", "bad"], "passing_labels": ["good"]}
PYTHON = {"type": "python", "name": "p", "source": "def grade(sample, item): return 1"}


def multi(graders: Any, formula: str = "a") -> dict[str, Any]:
    return {"type": "multi", "name": "all", "graders": graders, "calculate_output": formula}


def without(grader: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in grader.items() if key != name}


# --- reading


@pytest.mark.parametrize(
    "grader",
    [
        CHECK,
        PYTHON,
        {**PYTHON, "image_tag": "2025-05-08"},
        {**SCORE, "range": [0, 5], "sampling_params": {"temperature": 0, "seed": 1, "max_completions_tokens": 9}},
        {**SCORE, "range": None, "sampling_params": None},
        {**SCORE, "input": [{"role": "system", "content": {"type": "input_text", "text": "x"}, "type": "message"}]},
        {**SCORE, "input": [{"role": "user", "content": ["x", {"type": "output_text", "text": "y"}]}]},
        multi({"a": CHECK, "b": LABEL}, "a + b"),
    ],
)
def test_what_openai_describes_is_read(grader: dict[str, Any]) -> None:
    reading.check(reading.read(grader))


def test_one_grader_alone_in_a_multi_has_its_own_name() -> None:
    grader = reading.read(multi(CHECK))
    assert isinstance(grader, Multi)
    assert list(grader.graders) == ["a"]


@pytest.mark.parametrize(
    ("grader", "param", "words"),
    [
        ("x", "grader", "must be an object; it is a string"),
        ({}, "grader.type", "one of string_check, text_similarity, python, score_model, multi"),
        ({"type": "judge"}, "grader.type", "is 'judge'"),
        (LABEL, "grader.type", "only in the graders of a multi"),
        (without(CHECK, "reference"), "grader.reference", "Missing required parameter"),
        ({**CHECK, "operation": "neq"}, "grader.operation", "is 'neq'; it must be one of eq, ilike, like, ne"),
        ({**CHECK, "name": 3}, "grader.name", "must be a string; it is a number"),
        ({**CHECK, "refrence": ""}, "grader.refrence", "Did you mean grader.reference?"),
        ({**CHECK, "input": "{{ item.x | upper }}"}, "grader.input", "{{ item.x | upper }}"),
        ({**CHECK, "input": "{{ row.x }}"}, "grader.input", "item or sample"),
        ({**SCORE, "range": [1, 0]}, "grader.range", "[1, 0]; the first number must be below"),
        ({**SCORE, "range": [1]}, "grader.range", "a list of 2 entries"),
        ({**SCORE, "input": []}, "grader.input", "at least 1 entry"),
        ({**SCORE, "input": [{"role": "bot", "content": ""}]}, "grader.input[0].role", "is 'bot'"),
        (
            {**SCORE, "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "grader.input[0].content",
            "read text only",
        ),
        ({**SCORE, "sampling_params": {"temperature": 3}}, "grader.sampling_params.temperature", "from 0 to 2"),
        (
            {**SCORE, "sampling_params": {"top_k": 3}},
            "grader.sampling_params.top_k",
            "Did you mean grader.sampling_params.top_p?",
        ),
        ({**PYTHON, "source": "x" * 300_000}, "grader.source", "more than 256 kB"),
        (multi({}), "grader.graders", "it has 0"),
        (multi({"a b": CHECK}), "grader.graders", "'a b', which no formula can name"),
        (multi({"class": CHECK}), "grader.graders", "which no formula can name"),
        (multi({"a": multi({})}), "grader.graders.a.type", "is 'multi'"),
        (multi({"a": {**CHECK, "operation": ""}}), "grader.graders.a.operation", "must be one of"),
        (multi({"a": {**CHECK, "input": "{{x}}"}}), "grader.graders.a.input", "has the template {{x}}"),
        (multi({"a": {**LABEL, "passing_labels": ["fine"]}}), "grader.graders.a.passing_labels", "'fine'"),
        (multi({"a": CHECK}, "a + b"), "grader.calculate_output", "names 'b'; there is a"),
    ],
)
def test_a_refusal_names_the_field_what_it_is_and_what_it_may_be(grader: Any, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        reading.check(reading.read(grader))
    assert caught.value.param == param
    assert words in str(caught.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.sampled_from([CHECK, SCORE, PYTHON, multi({"a": CHECK}), multi(LABEL)]),
    st.data(),
)
def test_nothing_that_json_can_say_is_more_than_refused(
    value: Any, grader: dict[str, Any], data: st.DataObject
) -> None:
    key = data.draw(st.sampled_from(list(grader)))
    for changed in (value, {**grader, key: value}, multi({"a": {**CHECK, "input": value}})):
        assert _refused_at(changed).startswith("grader")


def _refused_at(grader: Any) -> str:
    """Return the field that a grader is refused for; `grader` when it is not refused."""
    try:
        reading.check(reading.read(grader))
    except InvalidRequest as error:
        return error.param or ""
    return "grader"


# --- templates

VALUES = {
    "sample": templates.sample_of('{"a": [{"b": "deep"}], "n": 1.5}'),
    "item": {"x": "red", "list": ["p", "q"], "map": {"two words": True, "a-b": 3}, "null": None},
}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("nothing { } {{", "nothing { } {{"),
        ("{{item.x}} and {{ item.x }}", "red and red"),
        ("{{item.list[1]}}{{item.list.0}}{{item.list[-1]}}", "qpq"),
        ('{{item.map["two words"]}}', "true"),
        ("{{ item['map']['a-b'] }}{{item.map.a-b}}", "33"),
        ("{{item.list}} {{item.null}}", '["p","q"] null'),
        ("{{sample.output_json.a[0].b}} {{sample.output_json.n}}", "deep 1.5"),
        ("{{sample.output_text}}", '{"a": [{"b": "deep"}], "n": 1.5}'),
        ("{{sample.choices[0].message.content}}", '{"a": [{"b": "deep"}], "n": 1.5}'),
    ],
)
def test_a_template_is_filled(text: str, filled: str) -> None:
    templates.check(text, "input")
    assert templates.fill(text, VALUES) == filled


def test_what_was_filled_in_is_no_template() -> None:
    assert templates.fill("{{item.x}}", {"item": {"x": "{{item.x}}"}}) == "{{item.x}}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{item.y}}", "{{item.y}}: there is no 'y'; there is x, list, map, null."),
        ("{{item.list[7]}}", "{{item.list[7]}}: it is a list of 2"),
        ("{{item.list.first}}", "it is a list of 2"),
        ("{{item.x.y}}", "{{item.x.y}}: item.x has no parts."),
    ],
)
def test_a_missing_variable_is_named(text: str, words: str) -> None:
    with pytest.raises(templates.MissingVariable) as caught:
        templates.fill(text, VALUES)
    assert words in str(caught.value)


def test_a_sample_that_is_no_json_is_told_from_a_missing_variable() -> None:
    with pytest.raises(templates.UnreadableSample):
        templates.fill("{{sample.output_json.a}}", {"sample": templates.sample_of("plain"), "item": {}})


def test_a_template_cannot_fill_the_memory() -> None:
    with pytest.raises(templates.MissingVariable, match="longer than"):
        templates.fill("{{item.x}}" * 1000, {"item": {"x": "x" * 100_000}})


# --- formulas


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a", 0.5),
        ("  a + 2*b ", 4.5),
        ("(a + b) / 2", 1.25),
        ("b ^ 3 + 1", 9.0),
        ("2 * b ^ 2", 8.0),
        ("-b ^ 2", -4.0),
        ("b ** 2", 4.0),
        ("min(a, b, 0.1) + max(a)", 0.6),
        ("abs(a - b) + floor(1.7) + ceil(1.2)", 4.5),
        ("exp(0) + sqrt(16) + log(1)", 5.0),
    ],
)
def test_a_formula_is_computed(text: str, value: float) -> None:
    assert Formula(text, frozenset({"a", "b"})).value({"a": 0.5, "b": 2.0}) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        "c",
        "a.real",
        "a[0]",
        "'a'",
        "True",
        "a if b else 1",
        "lambda: 1",
        "[a]",
        "(a := 1)",
        "a < b",
        "a and b",
        "not a",
        "~1",
        "a % 2",
        "a // 2",
        "a << 2",
        "1j",
        "9" * 1000,
        "__import__('os').system('true')",
        "pow(a, 2)",
        "min()",
        "sqrt(a, b)",
        "min(*a)",
        "max(a, key=b)",
        "(" * 500 + "a" + ")" * 500,
        "-" * 1900 + "a",
        "a" + "+a" * 900,
        "not " * 400 + "a",
        "a" * 3000,
        "a\0",
        "a\nb",
    ],
)
def test_nothing_else_is_a_formula(text: str) -> None:
    with pytest.raises(FormulaError):
        Formula(text, frozenset({"a", "b"}))


@pytest.mark.parametrize(
    "text", ["a / 0", "log(0)", "sqrt(-1)", "exp(1000)", "9 ^ 9 ^ 9", "(-1) ^ 0.5", "1e999", "0 ^ -1"]
)
def test_a_formula_without_a_finite_value_says_so(text: str) -> None:
    with pytest.raises(FormulaError):
        Formula(text, frozenset({"a"})).value({"a": 0.5})


@given(st.text(alphabet="ab01.+-*/^() ,minmaxabslogexpsqrt_[]'\"", max_size=60))
def test_a_formula_is_computed_or_refused(text: str) -> None:
    try:
        value = Formula(text, frozenset({"a", "b"})).value({"a": 0.5, "b": 2.0})
    except FormulaError:
        return
    assert math.isfinite(value)


@given(st.text(min_size=1, max_size=8))
def test_what_is_a_name_can_be_named(name: str) -> None:
    if is_name(name):
        assert Formula(f"{name} * 2", frozenset({name})).value({name: 1.5}) == 3.0


# --- checks and answers


@pytest.mark.parametrize(
    ("operation", "text", "reference", "holds"),
    [
        ("eq", "red", "red", True),
        ("eq", "red", "Red", False),
        ("ne", "red", "Red", True),
        ("ne", "red", "red", False),
        ("like", "a red rose", "red", True),
        ("like", "a Red rose", "red", False),
        ("like", "red", "a red rose", False),
        ("like", "100%", "%", True),
        ("ilike", "a RED rose", "red", True),
        ("ilike", "STRASSE", "straße", True),
        ("ilike", "rose", "red", False),
    ],
)
def test_string_checks(operation: Any, text: str, reference: str, holds: bool) -> None:
    assert string_check(operation, text, reference) is holds


def answer(text: str, **more: Any) -> ModelAnswer:
    return ModelAnswer(text=text, usage=Usage(), **more)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"steps": [{"description": "d", "conclusion": "c"}], "result": 3}', 3.0),
        ('```json\n{"result": 2.5}\n```', 2.5),
        ('Like {"this": 1} I think.\n{"result": 4}', 4.0),
        ('{"result": 1} no, {"result": 2}', 2.0),
        ('{"a": {"result": 9}, "result": 1}', 1.0),
        (" 4.5\n", 4.5),
        ('{"result": 99}', 5.0),
        ('{"result": -1}', 0.0),
    ],
)
def test_a_score_is_found_and_kept_in_its_range(text: str, value: float) -> None:
    grader = reading.read({**SCORE, "range": [0, 5]})
    assert isinstance(grader, ScoreModel)
    assert model_graders.score(grader, answer(text)) == value


@pytest.mark.parametrize(
    ("given_answer", "flag"),
    [
        (answer("I would say 4 of 5"), "model_grader_parse_error"),
        (answer('{"result": "high"}'), "model_grader_parse_error"),
        (answer('{"result": true}'), "model_grader_parse_error"),
        (answer('{"result": NaN}'), "model_grader_parse_error"),
        (answer("nan"), "model_grader_parse_error"),
        (answer('{"result": 1', cut=True), "model_grader_parse_error"),
        (answer("[" * 5000 + "{" * 5000), "model_grader_parse_error"),
        (answer("  "), "unresponsive_reward_error"),
        (answer("", refusal="I cannot judge people."), "model_grader_refusal_error"),
    ],
)
def test_an_answer_without_a_score_is_a_fault(given_answer: ModelAnswer, flag: str) -> None:
    grader = reading.read(SCORE)
    assert isinstance(grader, ScoreModel)
    with pytest.raises(Fault) as caught:
        model_graders.score(grader, given_answer)
    assert caught.value.flag == flag
    if given_answer.cut:
        assert "cut off at its token limit" in caught.value.details


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ('{"steps": [], "result": "good"}', True),
        ('{"result": "bad"}', False),
        ("Good.", True),
        ('"bad"', False),
    ],
)
def test_a_label_is_found(text: str, passes: bool) -> None:
    assert model_graders.passes(_label(), answer(text)) is passes


def test_an_answer_that_mentions_labels_is_none() -> None:
    with pytest.raises(Fault) as caught:
        model_graders.passes(_label(), answer("It is good, not bad."))
    assert caught.value.flag == "model_grader_parse_error"


def test_labels_that_differ_in_case_alone_are_told_apart() -> None:
    grader = _label(labels=["A", "a"], passing_labels=["a"])
    assert model_graders.passes(grader, answer("a"))
    assert not model_graders.passes(grader, answer('{"result": "A"}'))
    with pytest.raises(Fault):
        model_graders.passes(grader, answer("a."))


def test_a_model_is_told_how_to_answer() -> None:
    grader = reading.read({**SCORE, "range": [1, 3], "input": [{"role": "system", "content": "Be {{item.how}}."}]})
    assert isinstance(grader, ScoreModel)
    system, user = model_graders.messages_for(grader, {"item": {"how": "fair"}, "sample": {}})
    assert system == {"role": "system", "content": "Be fair."}
    assert user["role"] == "user"
    assert '"result": number' in user["content"]
    assert "from 1 to 3" in user["content"]
    asked = model_graders.messages_for(_label(), {})
    assert len(asked) == 1
    assert asked[0]["content"].startswith("Good?\n\n")
    assert 'one of "good", "bad"' in asked[0]["content"]


def _label(**changes: Any) -> LabelModel:
    grader = reading.read(multi({"a": {**LABEL, **changes}}))
    assert isinstance(grader, Multi)
    [only] = grader.graders.values()
    assert isinstance(only, LabelModel)
    return only
