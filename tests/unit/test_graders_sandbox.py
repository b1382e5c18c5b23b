"""The sandbox of python graders, attacked for real: as whoever runs the tests, and as an ordinary user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest

from rose.graders import sandbox
from tests.unit import sandbox_attacks

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's"), pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
SECONDS = 240
ORDINARY = 12345


def reward(source: str, sample: dict[str, object] | None = None, item: object = None, **limits: float) -> float:
    return sandbox.Run(source, {} if sample is None else sample, item, **limits).reward()  # type: ignore[arg-type]


def test_a_source_computes_with_sample_item_and_installed_packages() -> None:
    source = """
import json, math, re, statistics, collections
import numpy, rapidfuzz

def grade(sample: dict, item: dict) -> float:
    near = rapidfuzz.fuzz.ratio(sample["output_text"], item["answer"]) / 100
    return float(numpy.mean([near, math.sqrt(item["weight"])]))
"""
    assert reward(source, {"output_text": "Füße ☃"}, {"answer": "Füße ☃", "weight": 0.25}) == 0.75


@pytest.mark.parametrize("value", ["1", "True", "0.5", "-3", "10**3", "numpy.float32(0.5)"])
def test_every_kind_of_number_is_a_reward(value: str) -> None:
    import numpy

    source = f"import numpy\ndef grade(sample, item):\n    return {value}\n"
    assert reward(source) == float(eval(value, {"numpy": numpy}))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def grade(sample, item):\n    return 'high'\n", "grade returned str; it must return a number"),
        ("def grade(sample, item):\n    pass\n", "grade returned NoneType; it must return a number"),
        ("def grade(sample, item):\n    return {}\n", "TypeError"),
        ("def grade(sample, item):\n    return float('nan')\n", "grade returned nan"),
        ("def grade(sample, item):\n    return float('inf')\n", "grade returned inf"),
        ("def grade(sample, item):\n    return 10**400\n", "OverflowError"),
        ("def grade(sample):\n    return 1\n", "takes 1 positional argument but 2 were given"),
        ("grade = 3\n", "defines no function grade(sample, item)"),
        ("def score(sample, item):\n    return 1\n", "defines no function grade(sample, item)"),
        ("def grade(sample, item:\n    return 1\n", "SyntaxError"),
        ("import nowhere\n", "No module named 'nowhere'"),
    ],
)
def test_a_source_without_a_number_says_why(source: str, words: str) -> None:
    with pytest.raises(sandbox.SourceFailed) as caught:
        reward(source)
    assert words in str(caught.value)


def test_a_failure_shows_the_line_of_the_source_and_nothing_of_the_machinery() -> None:
    with pytest.raises(sandbox.SourceFailed) as caught:
        reward("def grade(sample, item):\n    answer = item['answer']\n    return 1\n", {}, {})
    assert str(caught.value).splitlines() == [
        "Traceback (most recent call last):",
        '  File "grader.py", line 2, in grade',
        "    answer = item['answer']",
        "             ~~~~^^^^^^^^^^",
        "KeyError: 'answer'",
    ]


WAYS = pytest.mark.parametrize("way", sandbox.WAYS)


@WAYS
@pytest.mark.slow
def test_every_attack_is_held(way: str) -> None:
    assert sandbox_attacks.failures(ways=[way]) == []


@pytest.mark.parametrize("name", ["udp", "passwords", "data folder", "listing", "temporary file", "thread", "fork"])
def test_outside_of_the_sandbox_the_same_attempts_succeed(name: str) -> None:
    given = sandbox_attacks.item(Path(__file__), 1, os.getpid())
    program = f"{sandbox_attacks.HELD[name]}\nos.write(1, str(grade({{}}, {given!r})).encode())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=SECONDS, check=True)
    assert b"0.0" in done.stdout


@pytest.fixture
def open_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder that every user may enter, for a Python that lies where only root can read."""
    folder = Path("/tmp") / f"rose-python-{os.getpid()}"
    folder.mkdir(mode=0o755)
    return folder


@WAYS
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; whoever else runs this is ordinary")
def test_every_attack_is_held_for_an_ordinary_user_too(open_python: Path, way: str) -> None:
    packages = sysconfig.get_path("purelib")
    script = f"""
mount --bind {sys.base_prefix} {open_python} && cd {ROOT} && exec setpriv --reuid={ORDINARY} --regid={ORDINARY} \
    --clear-groups env -i PATH=/usr/bin:/bin PYTHONPATH={ROOT}:{packages} PYTHONDONTWRITEBYTECODE=1 \
    {open_python}/bin/python3 -m tests.unit.sandbox_attacks {way}
"""
    try:
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    finally:
        shutil.rmtree(open_python)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def where_namespaces_are_refused(ways: tuple[str, ...]) -> str:
    """Return what a run says in a place where the kernel gives nobody another namespace."""
    program = (
        "from rose.graders import sandbox\n"
        f"run = sandbox.Run('def grade(sample, item): return 1', {{}}, {{}}, ways={ways!r})\n"
        "try:\n    print(run.result())\n"
        "except sandbox.Unavailable as error:\n    print(error.code, error)\n"
    )
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", script, sys.executable, program],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
        cwd=ROOT,
    )
    return done.stdout.strip()


def test_without_namespaces_landlock_takes_their_place() -> None:
    assert where_namespaces_are_refused(sandbox.WAYS) == "1.0"


def test_nothing_runs_where_the_kernel_refuses_both() -> None:
    assert where_namespaces_are_refused(("namespaces",)).startswith(
        "python_grader_unavailable Python graders cannot run on this server: it does not allow namespaces"
    )


def test_a_run_is_ended_from_outside() -> None:
    run = sandbox.Run("import time\ndef grade(sample, item):\n    time.sleep(1000)\n", {}, {}, seconds=1000)
    failed: list[Exception] = []

    def work() -> None:
        try:
            run.reward()
        except (sandbox.SourceFailed, sandbox.SandboxFailed) as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    run.kill()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert len(failed) == 1


def test_nothing_is_left_of_a_run() -> None:
    def children() -> set[str]:
        found = set()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if b"rose/graders/stage.py" in path.read_bytes():
                    found.add(path.parent.name)
            except OSError:
                continue
        return found

    before = children()
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(sandbox.SourceFailed):
        reward("def grade(sample, item):\n    while True: pass\n", seconds=0.5)
    assert reward("def grade(sample, item):\n    return 1\n") == 1.0
    assert children() <= before
    assert len(os.listdir("/proc/self/fd")) == descriptors
