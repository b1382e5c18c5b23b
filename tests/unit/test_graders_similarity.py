"""Text similarity: each metric against values that can be computed by hand, and texts at the edges."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rose.graders import similarity as module
from rose.graders.kinds import Metric
from rose.graders.similarity import METRICS, NotInstalled, TooLong, similarity

WITHOUT_DATA = [metric for metric in METRICS if metric != "meteor"]
MADE = "the cat sat on the mat today"
WANTED = "The cat sat on a mat today"


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        # the:2 cat sat on mat today against the cat sat on a mat today: 7 common, lengths 3 and sqrt 7
        ("cosine", 7 / (3 * math.sqrt(7))),
        ("rouge_1", 6 / 7),
        ("rouge_2", 4 / 6),
        ("rouge_3", 2 / 5),
        ("rouge_4", 1 / 4),
        ("rouge_5", 0.0),
        ("rouge_l", 6 / 7),
        # Upper and lower case count: common n-grams of 1 to 4 tokens, of 7 + 6 + 5 + 4
        ("gleu", (5 + 3 + 1 + 0) / 22),
        # Without "T" and "the" against "a", 24 characters stay in order, of 28 and 26
        ("fuzzy_match", 2 * 24 / (28 + 26)),
        # precisions 5/7, 3/6, 1/5, and 0/4 smoothed to 1/8
        ("bleu", (5 / 7 * 3 / 6 * 1 / 5 * 1 / 8) ** 0.25),
    ],
)
def test_a_metric_is_what_it_says(metric: Metric, value: float) -> None:
    assert similarity(metric, MADE, WANTED) == pytest.approx(value)


@pytest.mark.parametrize("metric", WITHOUT_DATA)
def test_a_text_is_wholly_like_itself(metric: Metric) -> None:
    text = "one two three four five six"
    assert similarity(metric, text, text) == pytest.approx(1.0)
    assert similarity(metric, text, "nothing of it here at all") < 0.5


@pytest.mark.parametrize("metric", ["cosine", "rouge_1", "rouge_l", "gleu", "fuzzy_match", "bleu"])
def test_other_alphabets_count(metric: Metric) -> None:
    assert similarity(metric, "кошка сидит на окне тут", "кошка сидит на окне там") > 0.5


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(WITHOUT_DATA), st.text(max_size=40), st.text(max_size=40))
def test_any_two_texts_can_be_compared(metric: Metric, text: str, reference: str) -> None:
    assert 0.0 <= similarity(metric, text, reference) <= 1.0


@pytest.mark.parametrize("metric", WITHOUT_DATA)
def test_what_would_take_too_long_is_refused(metric: Metric) -> None:
    with pytest.raises(TooLong, match="at most 50000"):
        similarity(metric, "x" * 60_000, "x")


def test_too_many_words_for_the_longest_common_part_are_refused() -> None:
    with pytest.raises(TooLong, match="rouge_l compares at most 1500"):
        similarity("rouge_l", "word " * 1501, "word")


@pytest.mark.parametrize("metric", ["fuzzy_match", "bleu", "gleu", "rouge_1"])
def test_a_missing_library_says_what_to_install(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rapidfuzz", "rapidfuzz.fuzz", "sacrebleu", "nltk", "nltk.translate.gleu_score"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(NotInstalled, match=r"pip install 'rose\[graders\]'"):
        module.require(metric)


def test_meteor_knows_stems_and_synonyms_where_wordnet_is(tmp_path: Path) -> None:
    """With a WordNet of one meaning, in WordNet's own format: car, auto."""
    _write_wordnet(tmp_path / "corpora" / "wordnet")
    program = (
        "from rose.graders.similarity import similarity\n"
        "for text in ('the car stops', 'the auto stopped', 'the dog stopped'):\n"
        "    print(similarity('meteor', text, 'the car stops'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "NLTK_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    same, synonym, other = map(float, done.stdout.split())
    # All three words match, in one piece of three: 1 - 0.5 (1/3)^3.
    assert same == synonym == pytest.approx(1 - 0.5 / 27)
    # Two of three match, in two pieces: harmonic mean 2/3, less a half.
    assert other == pytest.approx(2 / 3 * 0.5)


def test_meteor_without_wordnet_says_what_is_missing(tmp_path: Path) -> None:
    program = "from rose.graders import similarity as s\ntry: s.require('meteor')\nexcept s.NotInstalled as e: print(e)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "NLTK_DATA": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "python -m nltk.downloader wordnet" in done.stdout


def _write_wordnet(folder: Path) -> None:
    folder.mkdir(parents=True)
    head = "  1 made for a test\n"
    for part in ("noun", "verb", "adj", "adv"):
        for name in (f"index.{part}", f"data.{part}", f"{part}.exc"):
            (folder / name).write_text("" if name.endswith("exc") else head)
    place = f"{len(head):08d}"
    (folder / "data.noun").write_text(f"{head}{place} 06 n 02 car 0 auto 0 000 | a motor vehicle  \n")
    words = "".join(f"{word} n 1 0 1 0 {place}  \n" for word in ("auto", "car"))
    (folder / "index.noun").write_text(head + words)
    for name in ("cntlist.rev", "index.sense"):
        (folder / name).write_text("")
    (folder / "lexnames").write_text("".join(f"{number:02d}\tkind{number}\t1\n" for number in range(7)))
