"""Fixtures of the tests on real templates: each family's template, loaded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rose.language_models.template import ChatTemplate, load_template
from tests.real_templates import fetch


@pytest.fixture(scope="session")
def families() -> Path:
    """The folder with a folder per family, fetched before by the Makefile."""
    folder = fetch.folder()
    if not folder.is_dir():
        pytest.fail(f"the real tokenizers and templates are not in {folder}: run `{fetch.COMMAND}`", pytrace=False)
    return folder


@pytest.fixture(scope="session")
def template(families: Path) -> Callable[[str], ChatTemplate]:
    """A family's template by the family's name."""
    loaded: dict[str, ChatTemplate] = {}

    def of(family: str) -> ChatTemplate:
        if family not in loaded:
            loaded[family] = load_template(families / family)
        return loaded[family]

    return of
