"""What rendering and checking costs beside tokenising, on real tokenizers: 10,000 conversations of quickstart's kind.

Contestants: ROSE's `ChatTemplate.render` (text, proof, tokens, weights) and the model's own tokenizer on the texts that
come out. Processor time of one thread, so that busy neighbours count little; medians of rounds that alternate.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.record import record
from rose.domain.training_data import ChatExample
from rose.language_models.template import ChatTemplate, load_template
from tests.real_templates.fetch import fetch

EXAMPLES = 10_000
ROUNDS = 5
FAMILIES = ("smollm2", "qwen3", "llama3_1")
DATA = Path(__file__).parent.parent / "cli" / "data" / "quickstart.jsonl"


def conversations() -> list[ChatExample]:
    """Return as many conversations of quickstart's kind, no two the same."""
    rows = [json.loads(line)["messages"] for line in DATA.read_text().splitlines()]
    return [
        ChatExample(
            line=number,
            number=number,
            messages=tuple(
                {**message, "content": f"{message['content']} {number}"} for message in rows[number % len(rows)]
            ),
        )
        for number in range(EXAMPLES)
    ]


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the processor time that `work` takes."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(template: ChatTemplate, examples: list[ChatExample]) -> tuple[float, float, float]:
    """Return the seconds of rendering all examples, of the tokenizer alone, and the mean characters of a text."""
    texts = [
        "".join(piece.text for piece in sequence)
        for example in examples
        for sequence in template.preview(example, 4096).sequences
    ]

    def tokenise() -> None:
        for text in texts:
            template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)

    def render() -> None:
        for example in examples:
            template.render(example, 4096)

    rounds = [(cpu_seconds(render), cpu_seconds(tokenise)) for _ in range(ROUNDS)]
    mine, tokenizer = (statistics.median(side) for side in zip(*rounds, strict=True))
    return mine, tokenizer, sum(map(len, texts)) / len(texts)


def main() -> None:
    """Measure each family and record the table."""
    examples, families = conversations(), fetch()
    rows = []
    for family in FAMILIES:
        mine, tokenizer, characters = measure(load_template(families / family), examples)
        rows.append(
            (
                family,
                round(characters),
                f"{mine / EXAMPLES * 1e3:.3f}",
                f"{tokenizer / EXAMPLES * 1e3:.3f}",
                f"{(mine - tokenizer) / tokenizer:.2f}",
            )
        )
    record(
        "render",
        f"{EXAMPLES} conversations of quickstart's kind: all of ROSE's rendering (text, proof, tokens, weights) beside "
        "the model's own tokenizer on the same texts, processor time of one thread, medians of "
        f"{ROUNDS} rounds. The last column is what rendering and checking cost beside tokenising; the goal is 2.",
        ("family", "characters", "all ms each", "tokenizer ms each", "rendering and checking / tokenizer"),
        rows,
    )


if __name__ == "__main__":
    main()
