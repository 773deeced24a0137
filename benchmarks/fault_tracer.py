"""Kill -9 a process exactly before its n-th change of the file system, by tracing its system calls (Linux, ptrace(2)).

    end = traced(work, kill_at=12)      # runs `work` in a forked process
    end.killed, end.changes[-1]         # True, "rename /.../registry/records/onnx/000002.json"

A change is a call that opens a file for writing, writes, cuts, renames, links, removes, makes a folder or sets a mode. The
calls of every thread and of every library count, libgit2 and SQLite included: no library is patched. What is not a file
(pipes, devices) does not count, and calls in a row on SQLite's files count once: DVC keeps only what can be computed again there.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.errors import ConfigError

# Call -> (number on x86_64, on aarch64; None where it has none, argument that holds the path, or the descriptor where `by_fd`).
CALLS: dict[str, tuple[int | None, int | None, int, bool]] = {
    "open": (2, None, 0, False),
    "creat": (85, None, 0, False),
    "openat": (257, 56, 1, False),
    "write": (1, 64, 0, True),
    "pwrite64": (18, 68, 0, True),
    "writev": (20, 66, 0, True),
    "sendfile": (40, 71, 0, True),
    "copy_file_range": (326, 285, 2, True),
    "ftruncate": (77, 46, 0, True),
    "fsync": (74, 82, 0, True),
    "fdatasync": (75, 83, 0, True),
    "rename": (82, None, 1, False),
    "renameat": (264, 38, 3, False),
    "renameat2": (316, 276, 3, False),
    "link": (86, None, 1, False),
    "linkat": (265, 37, 3, False),
    "symlink": (88, None, 1, False),
    "symlinkat": (266, 36, 2, False),
    "unlink": (87, None, 0, False),
    "unlinkat": (263, 35, 1, False),
    "mkdir": (83, None, 0, False),
    "mkdirat": (258, 34, 1, False),
    "rmdir": (84, None, 0, False),
    "chmod": (90, None, 0, False),
    "fchmod": (91, 52, 0, True),
    "fchmodat": (268, 53, 1, False),
}
MACHINES = ("x86_64", "aarch64")
OPENS = {"open": 1, "openat": 2}  # the argument that holds the flags
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# linux/ptrace.h
TRACEME, CONT, SETOPTIONS, GET_SYSCALL_INFO = 0, 7, 0x4200, 0x420E
OPTIONS = 0x2 | 0x4 | 0x8 | 0x80 | 0x100000  # forks, vforks, threads; stop where the filter says; the tracee dies with its tracer
SECCOMP_STOP = 7
WALL = 0x40000000  # wait for threads as well
INFO_BYTES = 88
# linux/filter.h, linux/seccomp.h, linux/prctl.h
LOAD, IF_EQUAL, IF_ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, TRACE = 0x7FFF0000, 0x7FF00000
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2
SQLITE = "cache.db"


@dataclass(frozen=True)
class End:
    """How a traced process ended."""

    killed: bool
    code: int  # its exit code; meaningless when it was killed
    changes: list[str]  # every change it made or, the last one when killed, was about to make: call and path


def traced(work: Callable[[], object], kill_at: int = 0) -> End:
    """Run `work` in a forked process and kill that before its change number `kill_at` (from 1; 0: let it end).

    The caller must have no other child processes. Raises ConfigError where system calls cannot be traced.
    """
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        raise ConfigError(f"{platform.system()} on {platform.machine()} is not traced.", f"Run it on Linux, {' or '.join(MACHINES)}.")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes, libc.ptrace.restype = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_long
    child = os.fork()
    if child == 0:
        _run(work, libc)
    os.waitpid(child, 0)
    if libc.ptrace(SETOPTIONS, child, None, OPTIONS):
        os.kill(child, signal.SIGKILL)
        raise ConfigError("This process may not trace its children.", "Allow ptrace (Docker: --cap-add SYS_PTRACE).")
    return _follow(libc, child, kill_at)


def _run(work: Callable[[], object], libc: ctypes.CDLL) -> None:
    """The child: quiet, stopped at every change from here on, and never back in the caller's code."""
    code = 1
    try:
        silent = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(silent, descriptor)
        libc.ptrace(TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        lines = _filter()
        held = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
        program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(held)))
        if libc.prctl(SET_SECCOMP, FILTER, program, 0, 0) == 0:
            work()
            code = 0
    finally:
        os._exit(code)


def _filter() -> list[tuple[int, int, int, int]]:
    """A seccomp program that stops at CALLS alone: reading costs nothing. Lines of (code, jump if true, if false, value)."""
    machine = MACHINES.index(platform.machine())
    lines = [(LOAD, 0, 0, 0)]  # the call's number
    for name, call in CALLS.items():
        number = call[machine]
        if number is not None and name in OPENS:
            flags = 16 + 8 * OPENS[name]  # where the argument lies in struct seccomp_data
            lines += [
                (IF_EQUAL, 0, 4, number),
                (LOAD, 0, 0, flags),
                (IF_ANY_BIT, 0, 1, WRITES),
                (RETURN, 0, 0, TRACE),
                (RETURN, 0, 0, ALLOW),
            ]
        elif number is not None:
            lines += [(IF_EQUAL, 0, 1, number), (RETURN, 0, 0, TRACE)]
    return [*lines, (RETURN, 0, 0, ALLOW)]


def _follow(libc: ctypes.CDLL, child: int, kill_at: int) -> End:
    machine = MACHINES.index(platform.machine())
    names = {call[machine]: name for name, call in CALLS.items()}
    info = ctypes.create_string_buffer(INFO_BYTES)
    changes: list[str] = []
    stopped, deliver = child, 0
    while True:
        libc.ptrace(CONT, stopped, None, deliver)
        deliver = 0
        stopped, status = os.waitpid(-1, WALL)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if stopped == child:
                return End(os.WIFSIGNALED(status), os.waitstatus_to_exitcode(status), changes)
        elif status >> 16 == SECCOMP_STOP:
            libc.ptrace(GET_SYSCALL_INFO, stopped, INFO_BYTES, info)
            number, *arguments = struct.unpack_from("7Q", info.raw, 24)
            change = _change(names[number], stopped, arguments)
            if change and not (changes and SQLITE in change and SQLITE in changes[-1]):
                changes.append(change)
                if len(changes) == kill_at:
                    os.kill(child, signal.SIGKILL)
        elif os.WSTOPSIG(status) not in (signal.SIGSTOP, signal.SIGTRAP):  # those two are the tracing's own
            deliver = os.WSTOPSIG(status)


def _change(name: str, thread: int, arguments: list[int]) -> str:
    """The call and what it changes, or "" when it changes no file."""
    *_, position, by_fd = CALLS[name]
    if by_fd:
        try:
            path = os.readlink(f"/proc/{thread}/fd/{arguments[position] & 0xFFFFFFFF}")
        except OSError:  # not open: the call will fail
            return ""
        is_file = path.startswith("/")
    else:
        with open(f"/proc/{thread}/mem", "rb") as memory:
            memory.seek(arguments[position])
            path = memory.read1(4096).split(b"\0", 1)[0].decode(errors="replace")  # type: ignore[attr-defined]
        is_file = not (name.startswith("mkdir") and os.path.isdir(path))
    return f"{name} {path}" if is_file and not path.startswith("/dev/") else ""


def shown(change: str) -> str:
    """A change in few words: the call and the last parts of its path."""
    name, _, path = change.partition(" ")
    return f"{name} {'/'.join(Path(path).parts[-3:])}"
