"""Names of models: aliases and what they stand for, and the name of a fine-tuned model. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Literal

from rose.errors import InvalidRequest

BUILT_IN = ("tiny",)
"""Models that ROSE builds itself, without a hub."""
FETCHED = {"smollm2": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
"""Models that ROSE fetches from elsewhere than the hub and imports: name -> SHA-256 of the file."""

CHECKPOINT_MARK = ":ckpt-step-"
SUFFIX = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")
_EARLIER_TUNING = re.compile(r"-ft-\d{8}_\d{6}(-.*)?\Z")
IMPORTED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_RESERVED = ("last",)
"""Words that stand for a model on the command line."""
_MAX_HOPS = 10

SourceKind = Literal["built_in", "imported", "folder", "hub"]


def source_kind(source: str, imported: Collection[str] = ()) -> SourceKind | None:
    """Say what a source is by its form, and by the names that were imported; None when it is no possible source."""
    if source in BUILT_IN:
        return "built_in"
    if source in FETCHED or source in imported:
        return "imported"
    if source.startswith(("/", "./", "../", "~")):
        return "folder"
    if _HUB_ID.match(source) and ".." not in source:
        return "hub"
    return None


def resolve_alias(name: str, aliases: Mapping[str, str]) -> str:
    """Follow aliases from `name` to a source; a name without an alias stands for itself.

    Raises: InvalidRequest when aliases lead in a circle.
    """
    seen = [name]
    while (target := aliases.get(seen[-1])) is not None and target != seen[-1]:
        if target in seen or len(seen) > _MAX_HOPS:
            raise InvalidRequest(
                f"The model aliases lead in a circle: {' -> '.join([*seen, target])}. Change model_aliases.",
                code="invalid_setting",
                param="model",
            )
        seen.append(target)
    return seen[-1]


def name_of_file(file: str) -> str:
    """Return a name for a base from that of its file or folder: `SmolLM2 135M.Q4_1.gguf` -> `smollm2-135m.q4_1`."""
    stem = re.sub(r"\.gguf\Z", "", file, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")[:64] or "model"


def check_import_name(name: str, aliases: Collection[str]) -> str:
    """Return `name`. Raises: InvalidRequest when an imported base cannot be called so, or the name stands for another.

    A hub id has a slash, a checkpoint's name a colon; a fine-tuned model's is known by its time.
    """
    why = None
    if not IMPORTED_NAME.match(name):
        why = "it must be 1 to 64 of the characters A-Z a-z 0-9 . _ - and begin with a letter or digit"
    elif name.casefold() in (*BUILT_IN, *_RESERVED):
        why = "ROSE uses that name itself"
    elif name.casefold() in (alias.casefold() for alias in aliases):
        why = "it is an alias"
    elif _EARLIER_TUNING.search(name):
        why = "it has the form of a fine-tuned model's name"
    if why is not None:
        raise InvalidRequest(
            f"A base cannot be called {name[:80]!r}: {why}.",
            code="invalid_value",
            param="name",
            hint="Give it a name: --name my-model",
        )
    return name


def check_suffix(suffix: str) -> str:
    """Return `suffix`. Raises: InvalidRequest unless it is 1 to 64 letters, digits, dots, dashes or underscores."""
    if not SUFFIX.match(suffix):
        raise InvalidRequest(
            f"suffix is {suffix[:80]!r}; it must be 1 to 64 of the characters A-Z a-z 0-9 . _ -",
            code="invalid_value",
            param="suffix",
        )
    return suffix


def fine_tuned_name(requested: str, at: int, suffix: str | None, *, number: int = 1) -> str:
    """Build `{model}-ft-{YYYYMMDD_HHMMSS}-{suffix}` (UTC); `number` above 1 adds `-2`, `-3`, … for a clash.

    `{model}` is the name as requested, `/` -> `-`, without a checkpoint's or an earlier fine-tuning's part.
    """
    stem = requested.partition(CHECKPOINT_MARK)[0]
    stem = _EARLIER_TUNING.sub("", stem)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem.replace("/", "-")).strip("-.") or "model"
    moment = datetime.fromtimestamp(at, UTC).strftime("%Y%m%d_%H%M%S")
    parts = [stem, "ft", moment]
    if suffix:
        parts.append(suffix)
    if number > 1:
        parts.append(str(number))
    return "-".join(parts)


def split_checkpoint(name: str) -> tuple[str, int | None]:
    """Split `name:ckpt-step-20` into the model's name and the step; the step is None for a plain name."""
    stem, mark, step = name.rpartition(CHECKPOINT_MARK)
    if mark and step.isascii() and step.isdigit() and len(step) < 19:
        return stem, int(step)
    return name, None
