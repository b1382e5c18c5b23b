"""Projects: whose a file, job or model is. Everything belongs to exactly one, from its first event on."""

from __future__ import annotations

DEFAULT_PROJECT = "default"
"""The project of whoever calls without a key, and of everything that is older than projects."""
