"""Streamlit as a child process: `python -m apps.common.ui.child run ...` ends when its standard input does.

The parent holds the other end of that pipe, so the pages never outlive it, however it ended.
"""

from __future__ import annotations

import os
import signal
import threading

from streamlit.web.cli import main

STDIN = 0


def _end_with_parent() -> None:
    while os.read(STDIN, 1):  # not by sys.stdin: its lock would be held, and a process forked from this one closes it first
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    main(prog_name="streamlit")
