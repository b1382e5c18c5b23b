"""`rose events asyncapi`: what ROSE says on NATS, for programs."""

from __future__ import annotations

from cli.output import Output


def asyncapi() -> None:
    """Print the AsyncAPI document of the NATS subjects; no server is needed."""
    from rose import asyncapi

    Output().piece(asyncapi.encoded().decode())
