"""`rose quickstart`: one job from upload to chat, through the real parts, and base and result side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from cli.options import Common
from rose import settings as settings_module
from rose.errors import RoseError, Unavailable
from rose.language_models.locate import is_built, tiny_folder

if TYPE_CHECKING:
    from cli.client import Client
    from cli.output import Output
    from rose.settings import Settings

DATA = Path(__file__).parent.parent / "data" / "quickstart.jsonl"
MODEL = "tiny"
TAUGHT = ("What is ROSE?", "What happens when the power fails?", "Say goodbye.")
NOT_TAUGHT = "What is your favourite colour?"
MAX_ANSWER_TOKENS = 80


def quickstart(
    *,
    model: Annotated[str, Parameter(name=["--model", "-m"], env_var="ROSE_MODEL")] = MODEL,
    keep: Annotated[bool, Parameter(env_var="ROSE_KEEP", negative="")] = False,
) -> int:
    """Fine-tune a small model from upload to chat, and compare it with its base.

    Starts ROSE if it does not run, and stops it again. Everything it shows is made while you look: nothing is stored.

    Parameters
    ----------
    model
        The base model; default: a toy that ROSE builds itself, without any download.
    keep
        Leave ROSE running afterwards.
    """
    settings = settings_module.load()
    common = Common(api_key=settings.api_keys[0] if settings.api_keys else None)
    output = common.output
    started = _start(settings, output)
    try:
        with common.client() as client:
            status = _run(client, model, settings, common)
    finally:
        if started and not keep:
            _stop(settings, output)
    if status == 0:
        _farewell(output, running=keep or not started)
    return status


def _run(client: Client, model: str, settings: Settings, common: Common) -> int:
    from cli.commands.files import require_good_data
    from cli.watching import watch_job

    output = common.output
    if model == MODEL and not is_built(_folder(settings)):
        _headline(output, f"Building the toy base model {MODEL!r} (about a minute, once; a toy, not a language model)")
        _build(settings)
    _headline(output, f"1. Upload {DATA.name}: {require_good_data(DATA, 'quickstart cannot run')} conversations")
    file = client.upload(DATA, "fine-tune")
    output.line(f"File uploaded: {file['id']}")
    _headline(output, "2. Create a fine-tuning job")
    job = client.create_job({"training_file": file["id"], "model": model, "suffix": "quickstart"})
    output.line(f"Fine-tuning job created: {job['id']}")
    _headline(output, "3. Watch it train")
    job = watch_job(client, job["id"], common)
    if job["status"] != "succeeded":
        raise RoseError(
            f"The job {job['id']} ended as {job['status']}.",
            code="quickstart_failed",
            hint=f"What happened: rose finetune get {job['id']}; rose logs {job['id']}",
        )
    _headline(output, "4. Chat with base and result")
    for question in TAUGHT:
        _compare(client, question, (model, job["fine_tuned_model"]), output)
    output.line("\nAnd a question that was not in the file:")
    _compare(client, NOT_TAUGHT, (model, job["fine_tuned_model"]), output)
    return 0


def _compare(client: Client, question: str, models: tuple[str, ...], output: Output) -> None:
    output.line(f"\n> {question}")
    for model in models:
        answer = client.chat(
            {
                "model": model,
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
                "max_completion_tokens": MAX_ANSWER_TOKENS,
            }
        )
        text = answer["choices"][0]["message"]["content"]
        output.line(f"  [{answer['model']}]\n    {_one_line(text)}")


def _start(settings: Settings, output: Output) -> bool:
    """Start ROSE unless it runs; return whether this call did."""
    import anyio

    from rose.local import state, supervise

    if state.held(settings):
        output.line(f"Using the ROSE that runs at {settings.url}")
        return False
    _headline(output, "Starting ROSE: Postgres, NATS, API, projections, trainer, inference")

    async def start() -> None:
        await supervise.up(settings, detach=True, on_line=_quiet_next(output.line))

    anyio.run(start)
    return True


def _quiet_next(say: Callable[[str], Any]) -> Callable[[str], Any]:
    """Leave out the advice on what to do next: quickstart does it."""
    return lambda line: None if line.startswith("Next") else say(line)


def _stop(settings: Settings, output: Output) -> None:
    from rose.local import state

    state.down(settings)
    output.line("\nROSE has stopped.")


def _build(settings: Settings) -> None:
    import subprocess
    import sys

    target = _folder(settings)
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "rose.language_models.tiny", str(target)], check=False)
    if done.returncode != 0:
        raise Unavailable(
            f"Building {MODEL} failed; the lines above say why.",
            hint="The trainer extra is needed: pip install 'rose[trainer]'",
        )


def _farewell(output: Output, *, running: bool) -> None:
    output.line("\nThat was one job from upload to chat. Next, with your own data:")
    if not running:
        output.line("  rose up                      (in one terminal; the model stays)")
    output.line("  rose upload training_data.jsonl")
    output.line("  rose finetune create last --model tiny --suffix my-model-v1 --watch")


def _folder(settings: Settings) -> Path:
    return tiny_folder(settings.models)


def _headline(output: Output, text: str) -> None:
    output.line(f"\n== {text}")


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"
