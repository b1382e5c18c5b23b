"""What runs ROSE's services on this machine; see supervise.py. Nothing else of ROSE needs it."""

import sys

from rose.errors import Unavailable

if sys.platform == "win32":
    raise Unavailable(
        "ROSE's services run on Linux and macOS.",
        code="unsupported_platform",
        hint="On Windows use WSL: https://learn.microsoft.com/windows/wsl",
    )
