"""Webhooks without a network: decisions, signatures, and which addresses are public."""

from __future__ import annotations

from functools import reduce

import pytest

from rose.domain.webhooks import (
    Command,
    CreateWebhook,
    DeleteWebhook,
    DisableWebhook,
    RotateSecret,
    UpdateWebhook,
    WebhookDisabled,
    WebhookEnabled,
    WebhookState,
    WebhookUpdated,
    decide,
    evolve,
    initial,
)
from rose.errors import InvalidState, NotFound
from rose.webhooks import delivery
from rose.webhooks.signing import event_id, headers
from rose.webhooks.targets import BadTarget, is_public, parse

CREATE = CreateWebhook(
    webhook_id="whe_a",
    project="default",
    at=1,
    name="a",
    url="https://a.example",
    event_types=("fine_tuning.job.failed",),
    secret_id="s1",
    secret_hint="…1",
)
GONE = DisableWebhook(at=5, url="https://a.example", reason="gone", detail="410")


def given(*commands: Command) -> WebhookState:
    state = initial
    for command in commands:
        state = reduce(evolve, decide(command, state), state)
    return state


def rotate(at: int, secret_id: str, *, keep_old: bool) -> RotateSecret:
    return RotateSecret(at=at, secret_id=secret_id, secret_hint="…", keep_old=keep_old)


def signing(state: WebhookState, at: int) -> list[str]:
    return [secret.id for secret in state.signing(at)]


def test_a_kept_secret_signs_for_a_day_and_not_a_second_longer() -> None:
    state = given(CREATE, rotate(10, "s2", keep_old=True))
    assert signing(state, 10 + 86399) == ["s2", "s1"]
    assert signing(state, 10 + 86400) == ["s2"]


def test_a_second_rotation_keeps_the_first_end() -> None:
    state = given(CREATE, rotate(10, "s2", keep_old=True), rotate(100, "s3", keep_old=True))
    assert signing(state, 10 + 86399) == ["s3", "s2", "s1"]
    assert signing(state, 10 + 86400) == ["s3", "s2"]
    assert signing(given(CREATE, rotate(1, "s2", keep_old=True), rotate(2, "s3", keep_old=False)), 2) == ["s3"]


def test_old_secrets_are_bounded_and_those_that_ended_do_not_count() -> None:
    state = given(CREATE, *(rotate(number, f"s{number}", keep_old=True) for number in range(2, 6)))
    with pytest.raises(InvalidState, match="first of them ends at 86402"):
        decide(rotate(6, "s6", keep_old=True), state)
    later = 86400 + 6
    assert len(reduce(evolve, decide(rotate(later, "s6", keep_old=True), state), state).secrets) == 2


@pytest.mark.parametrize(
    ("command", "events"),
    [
        (UpdateWebhook(at=9), ()),
        (UpdateWebhook(at=9, name="a", url="https://a.example", event_types=("fine_tuning.job.failed",)), ()),
        (UpdateWebhook(at=9, name="b"), (WebhookUpdated(at=9, name="b"),)),
        (UpdateWebhook(at=9, enabled=True), (WebhookEnabled(at=9),)),
        (UpdateWebhook(at=9, enabled=False), ()),
        (
            UpdateWebhook(at=9, url="https://b.example"),
            (WebhookUpdated(at=9, url="https://b.example"), WebhookEnabled(at=9)),
        ),
        (UpdateWebhook(at=9, url="https://b.example", enabled=False), (WebhookUpdated(at=9, url="https://b.example"),)),
    ],
)
def test_updates_of_an_endpoint_that_is_off(command: UpdateWebhook, events: tuple[object, ...]) -> None:
    assert decide(command, given(CREATE, GONE)) == events


def test_the_receiver_at_a_former_address_switches_nothing_off() -> None:
    assert decide(GONE, given(CREATE)) == (WebhookDisabled(at=5, reason="gone", detail="410"),)
    assert decide(GONE, given(CREATE, UpdateWebhook(at=4, url="https://b.example"))) == ()
    assert decide(GONE, given(CREATE, GONE)) == ()


@pytest.mark.parametrize("command", [UpdateWebhook(at=9), rotate(9, "s2", keep_old=True), GONE, DeleteWebhook(at=9)])
def test_a_deleted_endpoint_is_gone(command: Command) -> None:
    with pytest.raises(NotFound):
        decide(command, given(CREATE, DeleteWebhook(at=8)))


def test_an_id_is_that_of_the_event_and_the_endpoint() -> None:
    assert event_id("whe_a", 7) == event_id("whe_a", 7)
    assert len({event_id("whe_a", 7), event_id("whe_b", 7), event_id("whe_a", 8)}) == 3


def test_the_signature_is_that_of_the_specification() -> None:
    """The example of the Standard Webhooks reference libraries."""
    made = headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}', ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"], 1614265330
    )
    assert made["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_schedule_goes_over_three_days() -> None:
    assert len(delivery.SCHEDULE) == 9
    assert 3 * 86400 < sum(delivery.SCHEDULE) < delivery.KEEP_SECONDS


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
        *("0.0.0.0", "255.255.255.255", "224.0.0.1", "240.0.0.1", "192.0.2.1"),
        *("::", "::1", "fe80::1", "fc00::1", "ff02::1", "fec0::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::127.0.0.1"),
        *("2002:7f00:1::", "2002:a00:1::1", "::ffff:0:127.0.0.1", "fe80::1%lo", "64:ff9b:1::1"),
    ],
)
def test_these_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"])
def test_these_addresses_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url", ["http://a.example", "https://me@a.example", "https://%6c/", "https://a\\@b/", "//a", "a"]
)
def test_these_are_no_targets(url: str) -> None:
    with pytest.raises(BadTarget):
        parse(url, private=False)


@pytest.mark.parametrize(
    "url", ["https://a.example/x?y=%20z", "https://[2606:4700::1111]:8443/", "https://bücher.example/", "https://a.:1/"]
)
def test_these_are_targets(url: str) -> None:
    assert parse(url, private=False).scheme == "https"
