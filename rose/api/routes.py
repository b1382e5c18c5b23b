"""Route decorators that answer 200 to every method, as OpenAI does (Litestar would answer 201 and 204)."""

from __future__ import annotations

from functools import partial

import litestar

get = litestar.get
post = partial(litestar.post, status_code=200)
delete = partial(litestar.delete, status_code=200)
