"""Network cameras: GStreamer's RTSP server stands for one, in the two encodings that cameras send, and is killed and held up."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from apps.common.settings import Settings
from apps.industrial.acquisition import video
from apps.industrial.acquisition.video import VideoSource
from apps.industrial.images import decode_image
from apps.industrial.inspection.recipe import RECIPE_FILE
from tests.conftest import Commands, absent, eventually
from tests.services import free_port

PYTHON = "/usr/bin/python3"
"""The system's own: the bindings of GStreamer are a package of Debian's."""
ENCODINGS = {"H.264": ("x264enc tune=zerolatency key-int-max=10", "rtph264pay"), "JPEG": ("jpegenc", "rtpjpegpay")}
Camera = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def camera(request: pytest.FixtureRequest) -> Iterator[tuple[int, Camera]]:
    """A port, and what starts a camera there."""
    wanted = "import gi; gi.require_version('GstRtspServer', '1.0')"
    if not Path(PYTHON).exists() or subprocess.run([PYTHON, "-c", wanted], capture_output=True).returncode:
        absent("gir1.2-gst-rtsp-server-1.0 is not installed: no RTSP server")
    port, started = free_port(), []

    def start() -> subprocess.Popen[str]:
        command = [PYTHON, str(Path(__file__).parent.parent / "rtsp_camera.py"), str(port), *ENCODINGS[request.param]]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield port, start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("camera", ENCODINGS, indirect=True)
def test_a_network_camera_that_dies_or_falls_silent_is_opened_again(
    camera: tuple[int, Camera], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(video, "ANSWER_MS", 1000)
    port, start = camera
    first = start()
    source = VideoSource(f"rtsp://127.0.0.1:{port}/line", retry_seconds=0.2)
    frames, stop = [], threading.Event()

    def collect() -> None:
        frames.extend(decode_image(frame.content) for frame in source.frames(stop))

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        eventually(lambda: len(frames) > 5, timeout=20)
        bars = frames[-1][60, 22::46].astype(int)  # white, yellow, cyan, green, magenta, red, blue
        expected = [(235, 235, 235), (235, 235, 16), (16, 235, 235), (16, 235, 16), (235, 16, 235), (235, 16, 16), (16, 16, 235)]
        assert np.abs(bars - expected).max() < 30, "red stays red: the channels are RGB"
        first.kill()
        first.wait()
        eventually(lambda: "does not answer" in caplog.text, timeout=20)
        second, known = start(), len(frames)
        eventually(lambda: len(frames) > known + 5, timeout=20)
        assert source.reconnects == 1
        caplog.clear()
        second.send_signal(signal.SIGSTOP)  # the cable is out: nothing comes, and nothing says so
        eventually(lambda: "does not answer" in caplog.text, timeout=20)
        second.send_signal(signal.SIGCONT)
        known = len(frames)
        eventually(lambda: len(frames) > known + 5, timeout=20)
        assert "the camera is back" in caplog.text
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("camera", ENCODINGS, indirect=True)
def test_the_command_ends_cleanly_while_the_camera_goes_on(camera: tuple[int, Camera], commands: Commands, settings: Settings) -> None:
    """A thread inside FFmpeg when the process ends would take it down: "FATAL: exception not rethrown"."""
    port, start = camera
    start()
    recipe = settings.home_path / "recipes" / "line"
    recipe.mkdir(parents=True)
    (recipe / RECIPE_FILE).touch()
    for number in (3, 8):
        done = commands.run("industrial", "feed", f"rtsp://127.0.0.1:{port}/line", "--recipe", "line", "--number", str(number))
        assert done.returncode == 0, done.stderr
        assert f"{number} frames sent" in done.stderr
