"""Keeps the alternate signal stack of a thread as it is while OpenVINO loads its CPU plugin.

The plugin gives the thread that loads it an alternate signal stack, and the former one back when it is unloaded. Of two plugins that are
unloaded in the order of their loading the second one brings back the stack of the first, which is unmapped by then: the next signal that
Python handles in that thread, a Ctrl-C, ends the process with a segmentation fault (OpenVINO 2026.4, `SigAltStackSetup` of its CPU
plugin). The stack is meant for the large registers of AMX; Python handles signals on the thread's own stack.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """`stack_t` of Linux (sigaltstack(2))."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """After the block this thread has the alternate signal stack it had before; nothing but the block on other systems than Linux."""
    if not sys.platform.startswith("linux"):
        yield
        return
    set_stack = ctypes.CDLL(None, use_errno=True).sigaltstack
    before = _Stack()
    known = set_stack(None, ctypes.byref(before)) == 0
    try:
        yield
    finally:
        if known:
            set_stack(ctypes.byref(before), None)
