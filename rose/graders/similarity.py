"""How near one text is to another, from 0 to 1, by the metrics of OpenAI's `text_similarity`: see docs/graders.md.

The libraries are those of the extra `graders`, loaded when they are first needed. Blocking: call it in a thread.
"""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rose.errors import InvalidRequest
from rose.graders.kinds import Metric

MAX_CHARACTERS = 50_000
MAX_COMPARED_WORDS = 1500
"""Most words for metrics whose time grows with the product of both lengths (about two seconds then)."""
_WORD = re.compile(r"[^\W_]+")
_corpus_lock = threading.Lock()
"""NLTK's corpora cannot be used by several threads."""


class NotInstalled(InvalidRequest):
    """A library or data that a metric needs are not on this server."""

    default_code = "graders_not_installed"


class TooLong(Exception):
    """A text is too long to be compared so; the message says how long it is and may be."""


def similarity(metric: Metric, text: str, reference: str) -> float:
    """Return how near `text` is to `reference`. Raises: NotInstalled; TooLong."""
    longest = max(len(text), len(reference))
    if longest > MAX_CHARACTERS:
        raise TooLong(f"A text has {longest} characters; at most {MAX_CHARACTERS} are compared.")
    return min(1.0, max(0.0, METRICS[metric](text, reference)))


def require(metric: Metric) -> None:
    """Check that a metric can be computed here. Raises: NotInstalled saying what to install."""
    similarity(metric, "a", "a")


def _cosine(text: str, reference: str) -> float:
    """Cosine of the vectors of word counts (the vector space model; Salton, Wong and Yang 1975)."""
    first, second = Counter(_words(text)), Counter(_words(reference))
    if not first or not second:
        return float(text == reference)
    product = sum(count * second[word] for word, count in first.items())
    return product / math.sqrt(sum(n * n for n in first.values()) * sum(n * n for n in second.values()))


def _fuzzy_match(text: str, reference: str) -> float:
    """1 minus the insertions and deletions from one to the other over both lengths (rapidfuzz's `fuzz.ratio`)."""
    fuzz = _library("rapidfuzz.fuzz")
    return fuzz.ratio(text, reference) / 100


def _bleu(text: str, reference: str) -> float:
    """BLEU of a sentence (Papineni et al. 2002) as sacreBLEU computes it: tokens `13a`, smoothing `exp`."""
    sacrebleu = _library("sacrebleu")
    return sacrebleu.sentence_bleu(text, [reference], smooth_method="exp", use_effective_order=True).score / 100


def _gleu(text: str, reference: str) -> float:
    """Google's BLEU of a sentence (Wu et al. 2016): n-grams of 1 to 4 tokens, the lower of precision and recall."""
    gleu_score = _library("nltk.translate.gleu_score")
    made, wanted = _tokens(text), _tokens(reference)
    return gleu_score.sentence_gleu([wanted], made) if made and wanted else float(text == reference)


def _meteor(text: str, reference: str) -> float:
    """METEOR (Lavie and Agarwal 2007) with exact words, Porter's stems and WordNet's synonyms, as NLTK computes it."""
    meteor_score = _library("nltk.translate.meteor_score")
    tokenizer = _library("nltk.tokenize.destructive").NLTKWordTokenizer()
    made, wanted = tokenizer.tokenize(text), tokenizer.tokenize(reference)
    _check_length(made, wanted, "meteor")
    with _corpus_lock:
        wordnet = _library("nltk.corpus").wordnet
        try:
            wordnet.ensure_loaded()
        except Exception:  # the boundary to NLTK: data that are not there, or not whole
            raise NotInstalled(
                "meteor needs the data of WordNet, which this server cannot read.",
                hint="python -m nltk.downloader wordnet",
            ) from None
        return meteor_score.single_meteor_score(wanted, made, wordnet=wordnet)


def _rouge(kind: str, text: str, reference: str) -> float:
    """F1 of ROUGE (Lin 2004) as rouge-score computes it, without stemming; words of all alphabets count."""
    scorer = _library("rouge_score.rouge_scorer")
    if kind == "rougeL":
        _check_length(_words(text), _words(reference), "rouge_l")
    return scorer.RougeScorer([kind], tokenizer=_Words()).score(reference, text)[kind].fmeasure


METRICS: Mapping[Metric, Callable[[str, str], float]] = {
    "cosine": _cosine,
    "fuzzy_match": _fuzzy_match,
    "bleu": _bleu,
    "gleu": _gleu,
    "meteor": _meteor,
    "rouge_1": partial(_rouge, "rouge1"),
    "rouge_2": partial(_rouge, "rouge2"),
    "rouge_3": partial(_rouge, "rouge3"),
    "rouge_4": partial(_rouge, "rouge4"),
    "rouge_5": partial(_rouge, "rouge5"),
    "rouge_l": partial(_rouge, "rougeL"),
}


class _Words:
    """Cuts a text for rouge-score. For English the same as its own tokenizer, which drops all other letters."""

    def tokenize(self, text: str) -> list[str]:
        return _words(text)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _tokens(text: str) -> list[str]:
    tokenizer = _library("sacrebleu.tokenizers.tokenizer_13a")
    return tokenizer.Tokenizer13a()(text).split()


def _check_length(made: list[str], wanted: list[str], metric: Metric) -> None:
    longest = max(len(made), len(wanted))
    if longest > MAX_COMPARED_WORDS:
        raise TooLong(f"A text has {longest} words; {metric} compares at most {MAX_COMPARED_WORDS}.")


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise NotInstalled(
            f"This metric needs {(error.name or name).partition('.')[0]}, which is not installed on this server.",
            hint="pip install 'rose[graders]'",
        ) from None
