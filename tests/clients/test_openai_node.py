"""openai-node's own suite passes against a running ROSE; it needs git, node and a network: `make test-clients`."""

from __future__ import annotations

import os

import anyio.to_thread
import pytest

from tests.clients import openai_node
from tests.clients.test_openai_python import base_url as base_url

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("ROSE_TEST_CLIENTS") != "all", reason="`make test-clients` runs it"),
]
TESTS = 54
"""As many tests of the pinned release are about what ROSE offers."""


async def test_the_suite_passes(base_url: str) -> None:
    outcomes = await anyio.to_thread.run_sync(openai_node.run, base_url)
    passed = [one.name for one in outcomes if one.passed]
    print(f"openai-node {openai_node.VERSION}: {len(passed)} of {len(outcomes)} pass")
    assert [one for one in outcomes if not one.passed] == []
    assert len(passed) == TESTS
