"""Random identifiers: a prefix and 20 characters of lower-case base 32 (100 random bits).

They carry no order and no time; order comes from log positions. Randomness in the first characters makes short
unique prefixes usable on the command line.
"""

from __future__ import annotations

import secrets

ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
LENGTH = 20


def new_id(prefix: str) -> str:
    """Return a fresh identifier such as `ftjob_k3v…`; `prefix` includes its separator, for example `file_`."""
    return prefix + "".join(secrets.choice(ALPHABET) for _ in range(LENGTH))
