"""Projects and keys from the command line: the first key, another team's, and what they open."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.cli.conftest import Rose

pytestmark = pytest.mark.anyio


async def test_two_teams_work_on_one_installation(rose: Rose, seed_file: Path) -> None:
    early = await rose("keys", "create", "bot")
    assert early.status == 5, "refused in this state, not a wrong call"
    assert early.err.startswith("error[first_key]: The first key must have the scope admin.")
    assert "There is no key" in (await rose("keys", "list")).err
    admin = (await rose("keys", "create", "me", "--scope", "admin", "-q")).out.strip()
    assert admin.startswith("sk-rose-")
    assert (await rose("files", "list")).status == 4
    known = ("--api-key", admin)
    made = await rose("projects", "create", "red", *known)
    assert made.out.startswith("Project created: proj_")
    red = (await rose("keys", "create", "red bot", "--project", "red", "-q", *known)).out.strip()
    assert (await rose("upload", str(seed_file), "--api-key", red)).status == 0
    assert len((await rose("files", "list", "-q", "--api-key", red)).out.split()) == 1
    assert (await rose("files", "list", "-q", *known)).out == ""
    refused = await rose("projects", "list", "--api-key", red)
    assert (refused.status, "scope write" in refused.err) == (4, True)
    keys = msgspec.json.decode((await rose("keys", "list", "--json", *known)).out)
    assert [(key["name"], key["scope"]) for key in keys] == [("red bot", "write"), ("me", "admin")]
    assert (await rose("keys", "revoke", keys[0]["id"], *known)).out == f"Key revoked: {keys[0]['id']}\n"
    assert (await rose("files", "list", "--api-key", red)).status == 4
    assert (await rose("projects", "archive", "red", *known)).status == 0
    assert "archived" in (await rose("projects", "list", "--archived", *known)).out
    assert (await rose("projects", "archive", "blue", *known)).status == 3
