"""The date that chat templates tell. Some (Llama 3.2, Mistral Small) ask for today's.

What is trained must be what is asked, and a run that is taken up on another day must be the same run; so the date stays
the same for ever: the one that Llama's own template tells where there is no clock.
"""

from __future__ import annotations

_DATE = {"d": "26", "b": "Jul", "B": "July", "m": "07", "Y": "2024", "y": "24", "A": "Friday", "a": "Fri", "j": "208"}
"""By the letters of strftime; every other part of a time is 00."""
_CLOCK = (
    "{%- macro strftime_now(format) %}{% for part in format.split('%') %}"
    f"{{{{ part if loop.first else {_DATE}.get(part.lstrip('-')[:1], '00') + part.lstrip('-')[1:] }}}}"
    "{% endfor %}{% endmacro %}"
)
"""A macro in place of transformers' function, because templates are given plain data only."""


def without_clock(template: str) -> str:
    """Return the template so that the present time does not change what it renders."""
    return _CLOCK + template if "strftime_now" in template else template
