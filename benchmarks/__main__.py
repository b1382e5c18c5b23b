"""Runs every benchmark, or those that are named, and writes docs/benchmarks.md: `python -m benchmarks append relay`.

What begins with a dash, and all after it, is an option of the benchmarks that are named.
"""

from __future__ import annotations

import sys
from importlib import import_module
from itertools import takewhile
from pathlib import Path

import msgspec

from benchmarks.record import RESULTS

BENCHMARKS = (
    "append",
    "relay",
    "streams",
    "streams_under_training",
    "lists",
    "claim",
    "start",
    "inference",
    "train",
    "preferences",
    "render",
    "quality",
)
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Written by `make bench`, which runs each contestant beside its peer on the same machine. Read the ratios: the machine is
small and shared, and the absolute figures are good to a factor, not to a digit. One benchmark alone:
`python -m benchmarks append`. Under each table stand the machine, the load before it, and the commit.

`make bench` leaves out what takes up to an hour and wants a machine without neighbours. These run when they are named,
and `--help` lists their options; with `--dry` nothing is recorded:

```sh
python -m benchmarks.vllm_peer setup                        # vLLM for the CPU, in /tmp/vllm-venv or ROSE_BENCH_VLLM
python -m benchmarks serving --model smollm2 --pairs 5      # streams over HTTP beside vLLM; texts are compared first
python -m benchmarks serving --model qwen --rose-threads 2 --vllm-threads 2 --label 2_threads
python -m benchmarks serving --against b4dffd0              # beside the ROSE of another commit
python -m benchmarks serving_goals --goals arrivals,long,prefix,training,new
python -m benchmarks churn                                  # 20,000 requests, 40 adapters, an engine that is killed
python -m benchmarks soak --minutes 60 --rate 2             # memory, waits and texts over an hour
```

The two servers take turns, and the one that is not asked is halted, since an idle one may use the cores. What strangers
on the machine used is in the last column; a run during which it was more than 0.3 cores does not count, and when none
counts the table says so and shows all. Each side runs with the threads and the type of numbers that the heading names:
measure both in the same type before comparing speeds.

## Where serving falls short of its goals, and why

- Eight streams over eight adapters run at 0.67 of ROSE's own base speed, where 0.7 was wanted (sixteen at 0.78; 1.55
  and 2.07 times vLLM). The adapters are 156 MB in fp32 that each step reads, 5 of the 20 ms that they cost; 3 ms more
  are the price of exactness ([profile](serving.md#where-the-time-goes)).
- Sixteen streams on the shape of Qwen2.5-0.5B run at 0.99 of vLLM's speed with one thread, where 1.2 was wanted. With
  two threads each, 16 streams were at 0.82 and 32 at 0.79 in the undisturbed runs of one try (136 and 151 beside 167
  and 190 tokens/s; not recorded, because a neighbour spoilt the others). The limit is the matrix rate: a step of 16
  rows is 16 GFLOP in 123 ms on one core, 128 GFLOP/s, and two cores give no engine more than 1.2 times what vLLM takes
  of them. Eight streams and fewer are bound by reading weights, where fp16 halves the bytes.
"""


def main() -> None:
    """Run them one after the other, then write the page from all results there are."""
    for name in tuple(takewhile(lambda name: not name.startswith("-"), sys.argv[1:])) or BENCHMARKS:
        import_module(f"benchmarks.{name}").main()
        print()
    PAGE.write_text(page())
    print(f"written to {PAGE}")


def page() -> str:
    """Return the page of all results in benchmarks/results."""
    parts = [HEAD]
    others = sorted(path.stem for path in RESULTS.glob("*.json") if path.stem not in BENCHMARKS)
    for name in (*BENCHMARKS, *others):
        path = RESULTS / f"{name}.json"
        if path.is_file():
            parts.append(section(msgspec.json.decode(path.read_bytes())))
    return "\n".join(parts)


def section(result: dict[str, object]) -> str:
    """Return one benchmark as a heading, its provenance and a table."""
    rows = msgspec.convert(result["rows"], list[dict[str, object]])
    columns = list(rows[0])
    lines = [
        f"## {result['name']}\n",
        f"{result['what']}\n",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows),
        f"\n{result['machine']}; commit {result['commit']}; {result['measured_at']}\n",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
