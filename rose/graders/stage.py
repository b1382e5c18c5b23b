"""The child process of a python grader: closes the sandbox around itself, then runs the source. Started by sandbox.py.

A program of its own, for `python -I -S`: it imports nothing of ROSE, and has nothing but what stands in the plan that
it reads from its standard input. It writes `+` once the sandbox is closed, then the result as JSON; without `+` it
writes why there is no sandbox, and nothing of the source has run.
"""

from __future__ import annotations

import ctypes
import json
import linecache
import math
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

RESULT = 32
"""The file descriptor that takes the result: beyond those that the way there opens."""
NOBODY = 65534
MAX_DETAILS = 4000
_NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""Mounts, control groups, host name, IPC, users, processes, network."""
_RECURSIVE, _PRIVATE, _BIND, _DETACH = 0x4000, 0x40000, 0x1000, 2
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_PROGRAMS = 1, 2, 4, 8
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILES, _READ_FOLDERS = 4, 8
_PR_PDEATHSIG, _PR_DUMPABLE, _PR_SECCOMP, _PR_DROP_BOUND, _PR_NO_NEW_PRIVILEGES, _PR_AMBIENT = 1, 4, 22, 24, 38, 47
_ROOT = "/proc"
"""Where the new root is put together: a folder that every Linux has and that nothing else is needed from."""

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """This machine does not allow a part of the sandbox."""


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


class _LandlockRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]


def main() -> NoReturn:
    """Do what the plan on the standard input says."""
    plan: dict[str, Any] = json.load(sys.stdin.buffer)
    out = 1
    try:
        _call("prctl", _PR_PDEATHSIG, signal.SIGKILL, what="a signal when the parent ends")
        if os.getppid() != plan["parent"]:
            os._exit(1)
        missing = _tried(_enter_namespaces) if "namespaces" in plan["ways"] else "namespaces"
        alive, held = os.pipe()
        child = os.fork()  # only a child lives in the new namespace of processes
        if child:
            _wait_for(child)
        os.close(held)
        _arrange_descriptors()
        out = RESULT
        folders = plan["folders"]
        missing = missing or _tried(lambda: _change_root(folders, plan["pivot_root"]))
        if missing is not None and "landlock" not in plan["ways"]:
            raise Refused(missing)
        rules = None if missing is None else _rules(folders, missing)
        _give_up_rights(change_user=missing is None)
        _set_limits(plan)
        if rules is not None:
            _call("syscall", ctypes.c_long(_LANDLOCK_RESTRICT), rules, 0, what="Landlock")
            os.close(rules)
        _call("prctl", _PR_PDEATHSIG, signal.SIGKILL, what="a signal when the parent ends")
        if select.select([alive], [], [], 0)[0]:  # the parent has ended before that was said
            os._exit(1)
        os.close(alive)
        _filter_calls(bytes.fromhex(plan["filter"]))
    except (Refused, OSError) as problem:
        _say({"refused": str(problem)}, out)
        os._exit(1)
    os.write(RESULT, b"+")
    _say(_grade(plan["source"], plan["sample"], plan["item"], plan["paths"]))
    os._exit(0)


def _tried(step: Callable[[], None]) -> str | None:
    """Return what this machine refuses of a step, or None."""
    try:
        step()
    except (Refused, OSError) as problem:
        return str(problem)
    return None


def _enter_namespaces() -> None:
    """Leave the network, the processes, the mounts and the rights of this machine behind."""
    ready, go = os.pipe()
    mapper = os.fork()  # the names of users are mapped from outside
    if mapper == 0:
        os.close(go)
        os._exit(_map_users(os.getppid()) if os.read(ready, 1) else 1)
    os.close(ready)
    try:
        _call("unshare", _NEW_NAMESPACES, what="namespaces of an ordinary user (user_namespaces(7))")
        os.write(go, b"+")
    finally:
        os.close(go)
        _, status = os.waitpid(mapper, 0)
    if status != 0:
        raise Refused("the users of a new namespace cannot be mapped")


def _map_users(process: int) -> int:
    """Map root and nobody where that is allowed, else nobody alone to who runs this. Returns the exit status."""
    folder = f"/proc/{process}"
    user, group = os.geteuid(), os.getegid()
    try:
        for name in ("uid_map", "gid_map"):
            with open(f"{folder}/{name}", "w") as file:
                file.write(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
        return 0
    except OSError:
        pass
    try:
        with open(f"{folder}/setgroups", "w") as file:
            file.write("deny")
        for name, number in (("uid_map", user), ("gid_map", group)):
            with open(f"{folder}/{name}") as file:
                if file.read().strip():
                    continue
            with open(f"{folder}/{name}", "w") as file:
                file.write(f"{NOBODY} {number} 1\n")
        return 0
    except OSError:
        return 1


def _wait_for(child: int) -> NoReturn:
    """Hold nothing that the result comes through, and end as the child does."""
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _arrange_descriptors() -> None:
    """Let the result go out by RESULT, and what the source prints nowhere."""
    os.dup2(1, RESULT)
    nothing = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)


def _change_root(folders: list[str], pivot_root: int) -> None:
    """Make a root that holds nothing but these folders, read-only."""
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    _mount("tmpfs", _ROOT, "tmpfs", _NO_SUID | _NO_DEVICES, "size=256k,nr_inodes=512,mode=755")
    for path in folders:
        target = _ROOT + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        os.mkdir(target)
        _mount(path, target, None, _BIND | _RECURSIVE)
        _restrict(target, _READ_ONLY | _NO_SUID | _NO_DEVICES, _AT_RECURSIVE)
    os.chdir(_ROOT)
    _call("syscall", pivot_root, b".", b".", what="another root")
    _call("umount2", b".", _DETACH, what="another root")
    os.chdir("/")
    _restrict("/", _READ_ONLY | _NO_SUID | _NO_DEVICES | _NO_PROGRAMS, 0)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    given = [None if text is None else text.encode() for text in (source, target, kind)]
    options = None if data is None else data.encode()
    _call("mount", *given, ctypes.c_ulong(flags), options, what=f"a mount on {target}")


def _restrict(path: str, attributes: int, flags: int) -> None:
    wanted = _MountAttributes(set=attributes)
    _call(
        "syscall",
        ctypes.c_long(_MOUNT_SETATTR),
        _AT_FDCWD,
        path.encode(),
        flags,
        ctypes.byref(wanted),
        ctypes.c_size_t(ctypes.sizeof(wanted)),
        what="read-only mounts (Linux 5.12)",
    )


def _rules(folders: list[str], missing: str) -> int:
    """Return Landlock's rules that let nothing be opened but what lies in these folders, for reading.

    That is the other way to the same end, where there can be no root of its own (containers, Ubuntu's AppArmor): the
    filter of system calls alone then keeps the source from the network and from other processes.
    """
    version = libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise Refused(f"{missing}; nor Landlock: {os.strerror(ctypes.get_errno())}")
    # Version 1 knows 13 kinds of access, 2 and 3 one more each, 5 another one.
    kinds = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    handled = ctypes.c_uint64((1 << kinds) - 1)
    size = ctypes.c_size_t(ctypes.sizeof(handled))
    rules = libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), ctypes.byref(handled), size, 0)
    if rules < 0:
        raise Refused(f"{missing}; nor Landlock: {os.strerror(ctypes.get_errno())}")
    for path in folders:
        folder = os.open(path, os.O_PATH)
        rule = _LandlockRule(allowed=_READ_FILES | _READ_FOLDERS, folder=folder)
        _call("syscall", ctypes.c_long(_LANDLOCK_ADD), rules, 1, ctypes.byref(rule), 0, what="Landlock")
        os.close(folder)
    return rules


def _give_up_rights(*, change_user: bool) -> None:
    """Give up every right for good. Without a root of its own, another user could perhaps not read Python's folders."""
    for capability in range(64):
        libc.prctl(_PR_DROP_BOUND, capability, 0, 0, 0)  # those beyond the kernel's last one do not exist
    if change_user and os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.prctl(_PR_AMBIENT, 4, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _call("capset", header, nothing, what="giving up capabilities")
    _call("prctl", _PR_NO_NEW_PRIVILEGES, 1, 0, 0, 0, what="no new privileges")
    _call("prctl", _PR_DUMPABLE, 0, 0, 0, 0, what="no core dumps")


def _set_limits(plan: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_AS: plan["memory_bytes"],
        resource.RLIMIT_CPU: plan["cpu_seconds"],  # at the hard limit the kernel kills, whatever the source does
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (least, least))


def _filter_calls(steps: bytes) -> None:
    program = _Program(len(steps) // 8, steps)
    _call("prctl", _PR_SECCOMP, 2, ctypes.byref(program), 0, 0, what="a filter of system calls (seccomp)")


def _call(name: str, *arguments: Any, what: str) -> None:
    if getattr(libc, name)(*arguments) != 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")


def _grade(source: str, sample: Any, item: Any, paths: list[str]) -> dict[str, Any]:
    """Run the source and its function `grade`; return the result, or what went wrong as its writer should see it."""
    sys.path[:] = paths
    sys.argv = ["grader"]
    linecache.cache["grader.py"] = (len(source), None, source.splitlines(keepends=True), "grader.py")
    try:
        names: dict[str, Any] = {"__name__": "grader"}
        exec(compile(source, "grader.py", "exec"), names)
        grade = names.get("grade")
        if not callable(grade):
            return {"error": "The source defines no function grade(sample, item)."}
        if sample is None:
            return {"defined": True}
        value: Any = grade(sample, item)
        if isinstance(value, (str, bytes)) or value is None:
            return {"error": f"grade returned {type(value).__name__}; it must return a number."}
        reward = float(value)
        if not math.isfinite(reward):
            return {"error": f"grade returned {reward}; it must return a finite number."}
        return {"reward": reward}
    except BaseException as error:
        return {"error": _details(error)}


def _details(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "MemoryError: the grader needs more memory than it may have."
    try:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != "grader.py":
            trace = trace.tb_next
        text = "".join(traceback.format_exception(type(error), error, trace)).strip()
    except BaseException:
        text = type(error).__name__
    return text if len(text) <= MAX_DETAILS else f"…{text[-MAX_DETAILS:]}"


def _say(message: dict[str, Any], out: int = RESULT) -> None:
    try:
        data = json.dumps(message).encode()
    except BaseException:
        data = b'{"error": "MemoryError"}'
    while data:
        data = data[os.write(out, data) :]


if __name__ == "__main__":
    main()
