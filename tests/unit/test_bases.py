"""Model names and aliases."""

from __future__ import annotations

import pytest

from rose.domain import bases
from rose.errors import InvalidRequest

AT = 1_718_109_296  # 2024-06-11 12:34:56 UTC


@pytest.mark.parametrize(
    ("requested", "suffix", "number", "name"),
    [
        ("qwen-coder", "my-model-v1", 1, "qwen-coder-ft-20240611_123456-my-model-v1"),
        ("qwen-coder", None, 1, "qwen-coder-ft-20240611_123456"),
        ("qwen-coder", "a", 3, "qwen-coder-ft-20240611_123456-a-3"),
        ("Qwen/Qwen2.5-0.5B", None, 1, "Qwen-Qwen2.5-0.5B-ft-20240611_123456"),
        ("qwen-coder-ft-20230101_000000-old", "new", 1, "qwen-coder-ft-20240611_123456-new"),
        ("qwen-coder-ft-20230101_000000:ckpt-step-5", "new", 1, "qwen-coder-ft-20240611_123456-new"),
        ("/models/../my model", None, 1, "models-..-my-model-ft-20240611_123456"),
        ("///", None, 1, "model-ft-20240611_123456"),
    ],
)
def test_fine_tuned_names(requested: str, suffix: str | None, number: int, name: str) -> None:
    assert bases.fine_tuned_name(requested, AT, suffix, number=number) == name


@pytest.mark.parametrize("suffix", ["", "a b", "ü", "a/b", "x" * 65, "a\n"])
def test_bad_suffixes_are_named(suffix: str) -> None:
    with pytest.raises(InvalidRequest, match="suffix") as caught:
        bases.check_suffix(suffix)
    assert caught.value.param == "suffix"


@pytest.mark.parametrize("suffix", ["a", "my-model_v1.2", "x" * 64, ".."])
def test_good_suffixes_pass(suffix: str) -> None:
    assert bases.check_suffix(suffix) == suffix


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("tiny", "built_in"),
        ("smollm2", "imported"),
        ("mine", "imported"),
        ("/models/x", "folder"),
        ("./x", "folder"),
        ("~/x", "folder"),
        ("Qwen/Qwen3-0.6B", "hub"),
        ("../x", "folder"),
        ("a/../b", None),
        ("no-such", None),
        ("", None),
        ("a/b/c", None),
    ],
)
def test_sources_are_told_apart_by_form(source: str, kind: str | None) -> None:
    assert bases.source_kind(source, ["mine"]) == kind


@pytest.mark.parametrize(
    "name", ["tiny", "Tiny", "last", "qwen-coder", "", "a/b", "-a", "a:ckpt-step-2", "x" * 65, "m-ft-20260101_000000"]
)
def test_names_that_stand_for_others_are_refused_for_imports(name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be called") as caught:
        bases.check_import_name(name, ["qwen-coder"])
    assert (caught.value.param, caught.value.hint) == ("name", "Give it a name: --name my-model")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct.q4_1"),
        ("My Model (2).GGUF", "my-model-2"),
        ("…", "model"),
        ("x" * 99, "x" * 64),
    ],
)
def test_a_name_is_made_from_the_files(file: str, name: str) -> None:
    assert bases.check_import_name(bases.name_of_file(file), []) == name


def test_aliases_are_followed_and_circles_refused() -> None:
    aliases = {"a": "b", "b": "/models/x", "c": "d", "d": "c", "e": "e"}
    assert bases.resolve_alias("a", aliases) == "/models/x"
    assert bases.resolve_alias("other", aliases) == "other"
    assert bases.resolve_alias("e", aliases) == "e"
    with pytest.raises(InvalidRequest, match="circle"):
        bases.resolve_alias("c", aliases)


def test_checkpoint_names_are_split() -> None:
    assert bases.split_checkpoint("m-ft-1:ckpt-step-20") == ("m-ft-1", 20)
    assert bases.split_checkpoint("m-ft-1") == ("m-ft-1", None)
    assert bases.split_checkpoint("m:ckpt-step-x") == ("m:ckpt-step-x", None)
