"""Each follower of the log that works alone has an advisory lock of its own; with another's it would stand by."""

from __future__ import annotations

from projections import runner
from rose import readers, relay
from rose.webhooks import delivery


def test_no_two_followers_share_a_lock() -> None:
    locks = [relay.LOCK, runner.REBUILD_LOCK, delivery.LOCK, readers.LOCK]
    assert len(set(locks)) == len(locks)
