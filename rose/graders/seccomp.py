"""The system calls that a python grader may make, as a seccomp filter (BPF; see the kernel's seccomp_filter.rst).

It is a list of what is allowed: computing, memory, reading files, time. Everything else fails with EPERM: sockets,
processes and threads, signals to others, running programs, mounts, tracing, changing files.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_LOAD, _JUMP_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCHITECTURE = 0, 4
"""Offsets in `struct seccomp_data`; the low half of argument n is at 16 + 8n on little-endian machines."""
_WRITING = 0o3 | 0o100 | 0o1000 | 0o2000 | 0o20000000
"""O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND, O_TMPFILE: the same numbers on both machines."""
_TERMINAL = (0x5401, 0x5450, 0x5451)
"""TCGETS, which tells a file from a terminal, and FIONCLEX, FIOCLEX."""
_DESCRIPTORS = (0, 1, 2, 3, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC; not F_SETOWN, by which a pipe signals other processes."""


_X86_64 = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "readv": 19, "writev": 20, "access": 21, "sched_yield": 24, "mremap": 25, "madvise": 28,
    "dup": 32, "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79, "readlink": 89,
    "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104,
    "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131, "statfs": 137, "fstatfs": 138, "gettid": 186,
    "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "restart_syscall": 219,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231,
    "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "ppoll": 271, "set_robust_list": 273, "getrandom": 318,
    "statx": 332, "rseq": 334, "faccessat2": 439,
    "ioctl": 16, "fcntl": 72, "openat": 257, "clone3": 435, "openat2": 437,
}  # fmt: skip
_AARCH64 = {
    "read": 63, "write": 64, "close": 57, "fstat": 80, "lseek": 62, "mmap": 222, "mprotect": 226, "munmap": 215,
    "brk": 214, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "pread64": 67, "readv": 65,
    "writev": 66, "sched_yield": 124, "mremap": 216, "madvise": 233, "dup": 23, "nanosleep": 101, "getpid": 172,
    "exit": 93, "uname": 160, "getcwd": 17, "gettimeofday": 169, "getrlimit": 163, "getrusage": 165,
    "sysinfo": 179, "times": 153, "getuid": 174, "getgid": 176, "geteuid": 175, "getegid": 177, "getppid": 173,
    "sigaltstack": 132, "statfs": 43, "fstatfs": 44, "gettid": 178, "futex": 98, "sched_getaffinity": 123,
    "getdents64": 61, "restart_syscall": 128, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115,
    "exit_group": 94, "newfstatat": 79, "readlinkat": 78, "faccessat": 48, "ppoll": 73,
    "set_robust_list": 99, "getrandom": 278, "statx": 291, "rseq": 293, "faccessat2": 439,
    "ioctl": 29, "fcntl": 25, "openat": 56, "clone3": 435, "openat2": 437,
}  # fmt: skip
MACHINES: Mapping[str, tuple[int, Mapping[str, int]]] = {
    "x86_64": (0xC000003E, _X86_64),
    "aarch64": (0xC00000B7, _AARCH64),
}
"""Machine (as `platform.machine()` has it) -> AUDIT_ARCH number, and the numbers of its system calls."""
_WITH_RULES = ("ioctl", "fcntl", "openat", "clone3", "openat2")


def program(machine: str) -> bytes:
    """Return the filter for a machine, as an array of `struct sock_filter`. Raises: KeyError for an unknown machine."""
    architecture, numbers = MACHINES[machine]
    code: list[bytes] = []
    code += [_step(_LOAD, _ARCHITECTURE), _step(_JUMP_EQUAL, architecture, 1, 0), _step(_RETURN, _KILL)]
    code += [_step(_LOAD, _NUMBER)]
    # The C library asks for clone3 and openat2 first, and takes the older call when there is none.
    for name in ("clone3", "openat2"):
        code += [_step(_JUMP_EQUAL, numbers[name], 0, 1), _step(_RETURN, _ERRNO | _ENOSYS)]
    code += _on(numbers["openat"], [_argument(2), _step(_JUMP_SET, _WRITING, 0, 1), _step(_RETURN, _ERRNO | _EPERM)])
    code += _on(numbers["ioctl"], _one_of(1, _TERMINAL))
    code += _on(numbers["fcntl"], _one_of(1, _DESCRIPTORS))
    for name, number in numbers.items():
        if name not in _WITH_RULES:
            code += [_step(_JUMP_EQUAL, number, 0, 1), _step(_RETURN, _ALLOW)]
    code += [_step(_RETURN, _ERRNO | _EPERM)]
    return b"".join(code)


def _on(number: int, rule: Sequence[bytes]) -> list[bytes]:
    """Return the steps that follow `rule` for one system call; a call that the rule lets through is allowed."""
    steps = [*rule, _step(_RETURN, _ALLOW)]
    return [_step(_JUMP_EQUAL, number, 0, len(steps)), *steps]


def _one_of(argument: int, values: Sequence[int]) -> list[bytes]:
    """Return the steps that refuse a call whose argument is none of `values`."""
    jumps = [_step(_JUMP_EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)]
    return [_argument(argument), *jumps, _step(_RETURN, _ERRNO | _EPERM)]


def _argument(position: int) -> bytes:
    return _step(_LOAD, 16 + 8 * position)


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
