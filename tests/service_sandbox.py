"""Runs a program under the system call filters of the service's unit, as systemd would load them.

`python service_sandbox.py FILE PROGRAM …`: FILE has a JSON list of the system calls that are allowed.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from pathlib import Path

_ALLOW, _EPERM = 0x7FFF0000, 0x00050000 | errno.EPERM
_UNKNOWN = -1
_PROT_WRITE, _PROT_EXEC, _SHM_EXEC = 2, 4, 0o100000
_MASKED_EQUAL = 7


class _Compare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def _load(seccomp: ctypes.CDLL, default: int, action: int, rules: list[tuple[str, tuple[int, int] | None]]) -> None:
    """A filter that answers `action` for each (system call, (argument, bits that are all set) or None)."""
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(default))
    for name, condition in rules:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number == _UNKNOWN:
            continue  # younger than this libseccomp, or of another processor
        compare = [] if condition is None else [_Compare(condition[0], _MASKED_EQUAL, condition[1], condition[1])]
        code = seccomp.seccomp_rule_add_array(
            context, action, number, len(compare), (_Compare * len(compare))(*compare)
        )
        if code and number >= 0:
            raise OSError(-code, f"{name}: {os.strerror(-code)}")
    code = seccomp.seccomp_load(context)
    if code:
        raise OSError(-code, os.strerror(-code))


def main() -> None:
    allowed = json.loads(Path(sys.argv[1]).read_text())
    seccomp = ctypes.CDLL("libseccomp.so.2")
    writable_code = [
        ("mmap", (2, _PROT_WRITE | _PROT_EXEC)),
        ("mprotect", (2, _PROT_EXEC)),
        ("pkey_mprotect", (2, _PROT_EXEC)),
        ("shmat", (2, _SHM_EXEC)),
    ]
    _load(seccomp, _ALLOW, _EPERM, list(writable_code))
    _load(seccomp, _EPERM, _ALLOW, [(name, None) for name in allowed])
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
