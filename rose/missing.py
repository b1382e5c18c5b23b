"""The errors for files, jobs and models that there are not, in OpenAI's words, with what shows those there are."""

from __future__ import annotations

from rose.errors import NotFound


def missing_file(file_id: str) -> NotFound:
    """Return the error for a file that there is not, or not any more."""
    error = NotFound(
        f"No such File object: {file_id}.", param="id", hint="`rose files list` shows the files there are."
    )
    error.code = None  # as the hosted service has it
    return error


def missing_job(job_id: str) -> NotFound:
    """Return the error for a job that there is not."""
    return NotFound(
        f"Could not find fine tune: {job_id}.",
        code="fine_tune_not_found",
        param="fine_tune_id",
        hint="`rose finetune list` shows the jobs there are.",
    )


def missing_model(name: str) -> NotFound:
    """Return the error for a model that there is not, or not any more."""
    return NotFound(
        f"The model '{name}' does not exist.",
        code="model_not_found",
        param="model",
        hint="`rose models list` shows the models there are.",
    )
