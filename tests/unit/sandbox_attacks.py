"""Sources that try to get out of the sandbox, or to hurt the machine from inside it.

`HELD` return 1.0 when the attempt was refused. `ENDED` are ended, with these words in what their writer is told.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rose.graders import sandbox

_REFUSED = """
import ctypes, os, signal, socket, subprocess, sys, threading

def refused(attempt, *errors):
    try:
        attempt()
    except (OSError, RuntimeError, *errors):
        return 1.0
    return 0.0

def call(number, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")

def read(path):
    with open(path) as file:
        return file.read()
"""


def _attempt(line: str) -> str:
    return f"{_REFUSED}\ndef grade(sample, item):\n    return refused(lambda: {line})\n"


HELD = {
    "connect": _attempt("socket.create_connection(('127.0.0.1', item['port']), timeout=5)"),
    "udp": _attempt("socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"),
    "unix socket": _attempt("socket.socket(socket.AF_UNIX)"),
    "netlink": _attempt("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"),
    "socketpair": _attempt("socket.socketpair()"),
    "name service": _attempt("socket.getaddrinfo('localhost', 80)"),
    "passwords": _attempt("read('/etc/passwd')"),
    "data folder": _attempt("read(item['secret'])"),
    "listing": _attempt("os.listdir(os.path.dirname(item['secret']))"),
    "devices": _attempt("open('/dev/null')"),
    "processes": _attempt("os.listdir('/proc/1')"),
    "parent's memory": _attempt("open(f'/proc/{item[\"parent\"]}/mem', 'rb')"),
    "parent's environment": _attempt("open(f'/proc/{item[\"parent\"]}/environ', 'rb')"),
    "file": _attempt("open('/written', 'w')"),
    "temporary file": _attempt("__import__('tempfile').TemporaryFile()"),
    "shared memory": _attempt("open('/dev/shm/written', 'w')"),
    "packages": _attempt("open(os.__file__, 'a')"),
    "folder": _attempt("os.mkdir('/made')"),
    "removal": _attempt("os.unlink(os.__file__)"),
    "rename": _attempt("os.rename(os.__file__, '/x')"),
    "mode": _attempt("os.chmod(os.__file__, 0o777)"),
    "memory file": _attempt("os.memfd_create('x')"),
    "fork": _attempt("os.fork()"),
    "thread": _attempt("threading.Thread(target=print).start()"),
    "program": _attempt("os.execv(sys.executable, ['python'])"),
    "subprocess": _attempt("subprocess.run([sys.executable, '-c', ''])"),
    "kill the parent": _attempt("os.kill(item['parent'], signal.SIGKILL)"),
    "kill all": _attempt("os.kill(-1, signal.SIGKILL)"),
    "signal by a pipe": _attempt("__import__('fcntl').fcntl(32, 8, item['parent'])"),
    "signal by tgkill": _attempt("call(234, item['parent'], item['parent'], 9)"),
    "signal by pidfd": _attempt("call(434, item['parent'], 0)"),
    "limits of the parent": _attempt("call(302, item['parent'], 0, None, ctypes.create_string_buffer(16))"),
    "links": _attempt("os.symlink('/etc/passwd', '/tmp/link')"),
    "change of folder": _attempt("os.chdir('/')"),
    "trace": _attempt("call(101, 16, item['parent'], 0, 0)"),
    "read another's memory": _attempt("call(310, item['parent'], 0, 0, 0, 0, 0)"),
    "session": _attempt("os.setsid()"),
    "user": _attempt("os.setuid(0)"),
    "namespace": _attempt("call(272, 0x10000000)"),
    "mount": _attempt("call(165, b'tmpfs', b'/', b'tmpfs', 0, None)"),
    "other root": _attempt("os.chroot('/')"),
    "more memory": _attempt("__import__('resource').setrlimit(9, (-1, -1)), ValueError"),
    "io_uring": _attempt("call(425, 1, 0)"),
    "bpf": _attempt("call(321, 0, 0, 0)"),
    "keys": _attempt("call(250, 0, -4, 0)"),
    "environment": "import os\ndef grade(sample, item):\n    return float(not set(os.environ) - set(item['known']))\n",
    "descriptors": """
import os

def grade(sample, item):
    found = []
    for descriptor in range(1024):
        try:
            found.append((descriptor, os.fstat(descriptor)))
        except OSError:
            pass
    nothing = {status.st_rdev for descriptor, status in found if descriptor < 3}
    return float([descriptor for descriptor, _ in found] == [0, 1, 2, 32] and len(nothing) == 1)
""",
    "frames": """
import gc, sys

def grade(sample, item):
    texts = [value for value in gc.get_objects() if isinstance(value, dict) and 'secret_of_the_server' in value]
    return float(not texts)
""",
}
NUMBERS_OF_X86_64 = {
    "signal by tgkill",
    "signal by pidfd",
    "limits of the parent",
    "trace",
    "read another's memory",
    "namespace",
    "mount",
    "io_uring",
    "bpf",
    "keys",
}

ENDED = {
    "endless loop": ("def grade(sample, item):\n    while True:\n        pass\n", "took more than"),
    "sleep": ("import time\ndef grade(sample, item):\n    time.sleep(1000)\n", "took more than"),
    "signals ignored": (
        "import signal, time\nfor number in (1, 2, 3, 14, 15, 24):\n    signal.signal(number, signal.SIG_IGN)\n"
        "def grade(sample, item):\n    while True:\n        time.sleep(10)\n",
        "took more than",
    ),
    "memory": ("def grade(sample, item):\n    return len(bytearray(1 << 34))\n", "MemoryError"),
    "memory, slowly": (
        "def grade(sample, item):\n    kept = []\n    while True:\n        kept.append(bytearray(1 << 20))\n",
        "MemoryError",
    ),
    "printing": (
        "def grade(sample, item):\n    while True:\n        print('x' * 1000000)\n",
        "took more than",
    ),
    "forged results": (
        "import os\ndef grade(sample, item):\n    while True:\n        os.write(32, b'x' * 100000)\n",
        "wrote more than",
    ),
    "early end": ("import os\ndef grade(sample, item):\n    os._exit(0)\n", "without a result"),
    "exit": ("import sys\ndef grade(sample, item):\n    sys.exit(3)\n", "SystemExit"),
    "crash": ("import ctypes\ndef grade(sample, item):\n    return ctypes.string_at(0)\n", "without a result"),
    "fork bomb": (
        "import os\ndef grade(sample, item):\n    while True:\n        os.fork()\n",
        "PermissionError",
    ),
    "recursion": ("def grade(sample, item):\n    return grade(sample, item)\n", "RecursionError"),
    "long trace": ("def grade(sample, item):\n    raise ValueError('x' * 100000)\n", "xxx"),
    "deep source": ("x = " + "(" * 5000 + "\ndef grade(sample, item):\n    return 1\n", "SyntaxError"),
}


LONG_SECONDS = 60.0


def item(secret: Path, port: int, parent: int) -> dict[str, Any]:
    """Return what the attacks know of the machine around the sandbox."""
    known = [*sandbox.ENVIRONMENT, "LC_CTYPE"]
    return {"secret": str(secret), "port": port, "parent": parent, "known": known}


def failures(seconds: float = 1.0, only: tuple[str, ...] = (), ways: Sequence[str] = sandbox.WAYS) -> list[str]:
    """Run the attacks and return those that got further than they may, with what happened."""
    found: list[str] = []
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        secret = Path(folder) / "secret"
        secret.write_text("key")
        given = item(secret, listener.getsockname()[1], os.getpid())
        for name, source in HELD.items():
            if (only and name not in only) or (name in NUMBERS_OF_X86_64 and platform.machine() != "x86_64"):
                continue
            try:
                reward = sandbox.Run(source, {}, given, ways=ways).reward()
            except sandbox.SourceFailed as problem:
                found.append(f"{name}: {problem}")
            else:
                if reward != 1.0:
                    found.append(f"{name}: not refused")
        for name, (source, words) in ENDED.items():
            if only and name not in only:
                continue
            try:
                # What ends by itself has all the time that a busy machine needs.
                bound = seconds if words == "took more than" else LONG_SECONDS
                run = sandbox.Run(source, {}, given, seconds=bound, memory_bytes=1 << 28, ways=ways)
                found.append(f"{name}: {run.reward()}")
            except sandbox.SourceFailed as problem:
                if words not in str(problem) or len(str(problem)) > 5000:
                    found.append(f"{name}: {problem}")
    return found


if __name__ == "__main__":
    problems = failures(ways=sys.argv[1:] or sandbox.WAYS)
    sys.stdout.write("\n".join(problems) + "\n")
    sys.exit(bool(problems))
