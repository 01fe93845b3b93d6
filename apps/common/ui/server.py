"""Serves the pages with Streamlit, on loopback unless told otherwise, with no outside requests."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apps.common.errors import UsageError

START_SECONDS, STOP_SECONDS = 60.0, 4.0


def _command(address: str, port: int, module: str = "streamlit") -> list[str]:
    spec = importlib.util.find_spec("apps")
    pages = Path(next(iter(spec.submodule_search_locations or ["apps"]))) / "pages.py" if spec else Path("pages.py")
    options = {
        "server.address": address,
        "server.port": str(port),
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "server.maxUploadSize": "2048",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
        "theme.light.primaryColor": "#1f77b4",
        "theme.dark.primaryColor": "#6db3e8",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return [sys.executable, "-m", module, "run", str(pages), *flags]


def _free(address: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise UsageError(
                f"the pages can't listen on {address}:{port}: {error}; choose another with --port or TRISCOPE_UI_PORT"
            ) from error


@contextmanager
def page_server(address: str, port: int) -> Iterator[str]:
    """The pages, served by a child process for the length of the block and of this process; their address once they answer."""
    _free(address, port)
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = _command(address, port, "apps.common.ui.child")
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    shown = "127.0.0.1" if address in ("0.0.0.0", "::") else address
    try:
        _wait(process, f"http://{shown}:{port}/_stcore/health")
        yield f"http://{shown}:{port}"
    finally:
        process.terminate()
        try:
            process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise UsageError(f"the pages ended at once with exit code {process.returncode}; see the message above")
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise UsageError(f"the pages did not answer at {url} within {START_SECONDS:.0f} s")


def serve_pages(address: str, port: int) -> None:
    """Serve until interrupted, in place of this process."""
    _free(address, port)
    command = _command(address, port)
    os.execv(command[0], command)
