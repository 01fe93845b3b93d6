"""Sources of frames: each against a real folder, file or peer, or a stand-in for hardware that follows its interface."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from apps.industrial.acquisition.base import Frame, FrameBuffer, fill
from apps.industrial.acquisition.folder import FolderSource
from apps.industrial.acquisition.genicam import GenicamSource, pixels_of
from apps.industrial.acquisition.named import source_named
from apps.industrial.acquisition.upload import WAITING, UploadSource
from apps.industrial.acquisition.video import VideoSource, without_password
from apps.industrial.errors import SourceError
from apps.industrial.images import decode_image, png
from tests.conftest import eventually


def picture(level: int = 90) -> bytes:
    return png(np.full((64, 80), level, np.uint8))


class Collected:
    """Runs a source in a thread and keeps its frames."""

    def __init__(self, source: Any) -> None:
        self.frames: list[Frame] = []
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(source,))

    def _run(self, source: Any) -> None:
        try:
            for frame in source.frames(self.stop):
                self.frames.append(frame)
        except SourceError as error:
            self.errors.append(error)

    def __enter__(self) -> Collected:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive(), "the source ends when it is told to"


def test_a_folder_gives_each_image_once_and_only_when_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "notes.txt").write_text("no image")
    with Collected(FolderSource(tmp_path, every=0.05)) as seen:
        eventually(lambda: len(seen.frames) == 1)
        content = picture(2)
        with (tmp_path / "b.png").open("wb") as stream:
            stream.write(content[:30])
            stream.flush()
            stream.write(content[30:])
        eventually(lambda: len(seen.frames) == 2)
    assert [frame.serial for frame in seen.frames] == ["a", "b"]
    assert seen.frames[1].content == content
    assert len(list(FolderSource(tmp_path, follow=False).frames(threading.Event()))) == 2
    with pytest.raises(SourceError, match="is no folder"):
        FolderSource(tmp_path / "nothing")


def test_a_file_that_is_written_over_is_a_new_picture(tmp_path: Path) -> None:
    """Cameras that write into a ring of names: image_0.png to image_7.png, and again."""
    with Collected(FolderSource(tmp_path, every=0.02)) as seen:
        for number, level in enumerate((10, 20, 30), 1):
            (tmp_path / "image_0.png").write_bytes(picture(level))
            eventually(lambda number=number: len(seen.frames) == number)  # type: ignore[misc]
            os.utime(tmp_path / "image_0.png", (number, number))
            time.sleep(0.1)
    assert [int(decode_image(frame.content).max()) for frame in seen.frames] == [10, 20, 30]


def test_a_name_that_is_no_utf8_gives_a_serial_number_all_the_same(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"teil-\xe4.png")).write_bytes(picture())
    (frame,) = FolderSource(tmp_path, follow=False).frames(threading.Event())
    assert frame.serial == "teil-\\udce4"


def test_a_folder_that_goes_away_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    share, elsewhere = tmp_path / "share", tmp_path / "elsewhere"
    share.mkdir()
    (share / "a.png").write_bytes(picture())
    caplog.set_level("INFO")
    with Collected(FolderSource(share, every=0.02)) as seen:
        eventually(lambda: len(seen.frames) == 1)
        share.rename(elsewhere)
        eventually(lambda: "can't be read: No such file or directory; trying again" in caplog.text)
        (elsewhere / "b.png").write_bytes(picture())
        elsewhere.rename(share)
        eventually(lambda: len(seen.frames) == 2)
    assert [frame.serial for frame in seen.frames] == ["a", "b"], "what was taken before is not taken again"
    assert caplog.text.count("trying again") == 1
    assert "share is back" in caplog.text


def test_a_file_that_is_too_large_is_passed_over_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("apps.industrial.acquisition.folder.MAX_BYTES", 1000)
    (tmp_path / "huge.png").write_bytes(b"\x89" * 2000)
    (tmp_path / "small.png").write_bytes(picture())
    assert [frame.serial for frame in FolderSource(tmp_path, follow=False).frames(threading.Event())] == ["small"]
    assert "huge.png has 2000 bytes" in caplog.text


def test_a_video_file_gives_all_its_frames(tmp_path: Path) -> None:
    path = tmp_path / "line.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for level in (40, 120, 200):
        writer.write(np.full((48, 64, 3), (0, 0, level), np.uint8))
    writer.release()
    frames = list(VideoSource(str(path)).frames(threading.Event()))
    assert [frame.serial for frame in frames] == ["00000001", "00000002", "00000003"]
    means = [decode_image(frame.content).reshape(-1, 3).mean(0) for frame in frames]
    assert all(mean[0] > 3 * mean[2] for mean in means), "red stays red: the channels are RGB"
    with pytest.raises(SourceError, match="can't open"):
        next(VideoSource(str(tmp_path / "nothing.avi")).frames(threading.Event()))


class Camera:
    """What cv2.VideoCapture is for a camera: three pictures, then silence while it is unplugged."""

    plugged, opened = True, 0

    def __init__(self, address: object) -> None:
        Camera.opened += 1
        self._left = 3

    def isOpened(self) -> bool:
        return Camera.plugged

    def read(self) -> tuple[bool, Any]:
        self._left -= 1
        return (True, np.full((32, 32, 3), 50, np.uint8)) if self._left >= 0 and Camera.plugged else (False, None)

    def release(self) -> None:
        pass


def test_a_camera_that_was_unplugged_is_opened_again_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    Camera.plugged, Camera.opened = True, 0
    source = VideoSource("0", retry_seconds=0.01, open_capture=Camera)
    with Collected(source) as seen:
        eventually(lambda: len(seen.frames) >= 3)
        Camera.plugged = False
        eventually(lambda: Camera.opened > 5)
        before, known = source.reconnects, len(seen.frames)
        Camera.plugged = True
        eventually(lambda: len(seen.frames) >= known + 3)
        assert source.reconnects > before
    assert "does not answer" in caplog.text
    assert "the camera is back" in caplog.text


class Harvester:
    """As harvesters' Harvester and its acquirer: one camera of Mono8 pictures that pauses once and is unplugged once."""

    def __init__(self) -> None:
        self.number = 0
        self.plugged = True
        self.ended: list[str] = []

    def add_file(self, path: str) -> None:
        self.path = path

    def update(self) -> None:
        self.cameras = ["cam-7"] if self.plugged and self.path.endswith(".cti") else []

    def create(self, wanted: Any) -> Any:
        if not self.cameras or (isinstance(wanted, dict) and wanted["serial_number"] not in self.cameras):
            self.plugged = True  # it is back at the next look
            raise ValueError("no such device")
        return self

    def start(self) -> None:
        self.ended.append("start")

    @contextmanager
    def _buffer(self) -> Iterator[Any]:
        part = SimpleNamespace(width=40, height=30, data=np.full(1200, self.number, np.uint8), data_format="Mono8", x_padding=0)
        yield SimpleNamespace(payload=SimpleNamespace(components=[part]))

    def fetch(self, timeout: float) -> Any:
        self.number += 1
        if self.number == 2:
            raise TimeoutError("GenTL timeout")
        if self.number == 4:
            self.plugged = False
            raise RuntimeError("device lost")
        return self._buffer()

    def stop(self) -> None:
        self.ended.append("stop")

    def destroy(self) -> None:
        self.ended.append("destroy")

    def reset(self) -> None:
        self.ended.append("reset")


def test_a_genicam_camera_waits_out_a_pause_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    camera, producer = Harvester(), tmp_path / "maker.cti"
    with pytest.raises(SourceError, match=r"maker\.cti is no file"):
        next(GenicamSource(producer, make=Harvester).frames(threading.Event()))
    producer.touch()
    source = GenicamSource(producer, make=lambda: camera, retry_seconds=0.01)
    frames = source.frames(stop := threading.Event())
    shown = [decode_image(next(frames).content) for _ in range(4)]
    assert [int(image.max()) for image in shown] == [1, 3, 5, 6], "the pause and the loss gave no frame"
    assert shown[0].shape == (30, 40)
    assert source.reconnects == 1
    assert "device lost; trying again" in caplog.text
    assert "the camera is back" in caplog.text
    stop.set()
    assert list(frames) == []
    assert camera.ended == ["start", "stop", "destroy", "start", "stop", "destroy", "reset"]
    with pytest.raises(SourceError, match="no camera cam-9"):
        next(GenicamSource(producer, "cam-9", make=Harvester).frames(threading.Event()))


SCENE = np.full((12, 20, 3), (200, 120, 40), np.uint8)
SCENE[4:8, 6:12] = (30, 60, 220)


def mosaic(order: str, white: int) -> NDArray[Any]:
    """What a sensor behind a Bayer filter sees of SCENE; `order`: the colours of its first two lines, as the PFNC names them."""
    places = {"RG": "RGGB", "GR": "GRBG", "GB": "GBRG", "BG": "BGGR"}[order]
    raw = np.empty(SCENE.shape[:2], np.uint16)
    for place, colour in enumerate(places):
        raw[place // 2 :: 2, place % 2 :: 2] = SCENE[place // 2 :: 2, place % 2 :: 2, "RGB".index(colour)]
    return np.round(raw * (white / 255)).astype(np.uint8 if white == 255 else np.uint16)


def component(data_format: str, data: NDArray[Any], x_padding: int = 0) -> Any:
    return SimpleNamespace(data_format=data_format, data=data.ravel(), height=12, width=20, x_padding=x_padding)


@pytest.mark.parametrize("order", ["RG", "GR", "GB", "BG"])
@pytest.mark.parametrize(("bits", "ending"), [(8, ""), (10, "p"), (12, ""), (12, "Packed"), (16, "")])
def test_the_mosaic_of_a_colour_camera_becomes_its_colours(order: str, bits: int, ending: str) -> None:
    found = pixels_of(component(f"Bayer{order}{bits}{ending}", mosaic(order, 2**bits - 1)))
    assert found is not None
    for place in ((2, 2), (5, 8), (10, 17)):  # away from edges, where the neighbours' colours are taken
        assert np.abs(found[place].astype(int) - SCENE[place]).max() <= 1


def test_pixel_formats_of_cameras_are_read_as_what_they_are() -> None:
    grey_level = SCENE[..., 0]
    for bits in (10, 12, 14, 16):
        found = pixels_of(component(f"Mono{bits}", np.round(grey_level * ((2**bits - 1) / 255)).astype(np.uint16)))
        assert found is not None
        assert np.abs(found.astype(int) - grey_level).max() <= 1, f"{bits} bits"
    alpha = np.full((12, 20, 1), 9, np.uint8)
    coloured = {"RGB8": SCENE, "BGR8": SCENE[..., ::-1], "RGBa8": np.dstack([SCENE, alpha]), "BGRa8": np.dstack([SCENE[..., ::-1], alpha])}
    for name, data in coloured.items():
        np.testing.assert_array_equal(pixels_of(component(name, data)), SCENE, name)
    brightness = np.dstack([grey_level, np.full_like(grey_level, 128)])  # no colour
    for name, data in (("YUV422_8", brightness), ("YUV422_8_UYVY", brightness[..., ::-1])):
        found = pixels_of(component(name, data))
        assert found is not None
        assert np.ptp(found.astype(int), axis=2).max() <= 1
        assert np.corrcoef(found[..., 0].ravel(), grey_level.ravel())[0, 1] > 0.999
    padded = np.pad(mosaic("RG", 4095), ((0, 0), (0, 2)))
    np.testing.assert_array_equal(pixels_of(component("BayerRG12", padded, 4)), pixels_of(component("BayerRG12", mosaic("RG", 4095))))
    assert pixels_of(component("Mono8", grey_level[:9])) is None, "lines are missing"
    with pytest.raises(SourceError, match="Coord3D_ABC16"):
        pixels_of(component("Coord3D_ABC16", grey_level))


def test_passwords_of_cameras_are_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SourceError, match=r"rtsp://\*\*\*@127.0.0.1:1/line") as refused:
        next(source_named("rtsp://operator:s3cr:e@t@127.0.0.1:1/line").frames(threading.Event()))
    assert "s3cr" not in str(refused.value) + caplog.text
    assert without_password("video.mp4") == "video.mp4"
    assert without_password("rtsp://host:554/a@b") == "rtsp://host:554/a@b"


def post(port: int, content: bytes, query: str = "") -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/frames{query}", data=content, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def answers(port: int) -> Callable[[], bool]:
    def check() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    return check


def test_pictures_are_posted_and_bad_posts_are_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.industrial.acquisition.upload.MAX_UPLOAD_BYTES", 100_000)
    source = UploadSource(0)
    with Collected(source) as seen:
        eventually(answers(source.port))
        assert post(source.port, picture(), "?serial=P-1") == (202, {"serial": "P-1", "bytes": len(picture())})
        assert post(source.port, b"")[0] == 400
        assert post(source.port, picture(), f"?serial={'x' * 201}")[0] == 400
        code, body = post(source.port, b"x" * 200_000)
        assert (code, "more than 100000 bytes" in body["error"]) == (413, True)
        eventually(lambda: len(seen.frames) == 1)
        with pytest.raises(SourceError, match="can't listen"):
            UploadSource(source.port)
    assert (seen.frames[0].serial, seen.frames[0].content) == ("P-1", picture())


def test_who_goes_away_and_who_sends_a_form_leave_no_frame(caplog: pytest.LogCaptureFixture) -> None:
    source = UploadSource(0)
    start = b"POST /frames HTTP/1.1\r\nHost: station\r\nContent-Length: 100000\r\n\r\nthe beginning"
    with Collected(source) as seen:
        eventually(answers(source.port))
        with socket.create_connection(("127.0.0.1", source.port)) as client:
            client.sendall(start)
            time.sleep(0.2)
        eventually(lambda: "a client went away within a picture" in caplog.text)
        address = f"http://127.0.0.1:{source.port}/frames"
        with urllib.request.urlopen(urllib.request.Request(address, data=picture(), method="PUT"), timeout=10) as answer:
            assert answer.status == 202
        form = urllib.request.Request(address, data=picture(), headers={"Content-Type": "multipart/form-data; boundary=x"})
        with pytest.raises(urllib.error.HTTPError, match="415") as refused:
            urllib.request.urlopen(form, timeout=10)
        assert "the bytes of a picture alone" in json.loads(refused.value.read())["error"]
        eventually(lambda: len(seen.frames) == 1)
        waiting = socket.create_connection(("127.0.0.1", source.port))
        waiting.sendall(start)
        time.sleep(0.2)
    with waiting:
        assert b"503" in waiting.recv(1000)
    assert len(seen.frames) == 1
    assert "Traceback" not in caplog.text


def test_uploads_listen_where_they_are_told_to(free_port: int) -> None:
    for named, reached in ((f"http:{free_port}", ["127.0.0.1"]), (f"http:0.0.0.0:{free_port}", ["127.0.0.1", "127.0.0.2"])):
        source = source_named(named)
        frames = source.frames(stop := threading.Event())
        puller = threading.Thread(target=lambda frames=frames: list(frames))
        puller.start()
        for address in ("127.0.0.1", "127.0.0.2"):
            with contextlib.closing(socket.socket()) as probe:
                assert (probe.connect_ex((address, free_port)) == 0) is (address in reached)
        stop.set()
        puller.join(20)
    with pytest.raises(SourceError, match=r"can't listen on 203\.0\.113\.7"):
        source_named(f"http:203.0.113.7:{free_port}")


def test_uploads_that_are_many_or_slow_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.industrial.acquisition.upload.MOST_HELD", 100_000)
    monkeypatch.setattr("apps.industrial.acquisition.upload.LONGEST_SECONDS", 3.0)
    source = UploadSource(0)
    with Collected(source) as seen:
        eventually(answers(source.port))
        clients = [socket.create_connection(("127.0.0.1", source.port), timeout=20) for _ in range(3)]
        for client in clients:
            client.sendall(b"POST /frames HTTP/1.1\r\nHost: station\r\nContent-Length: 90000\r\n\r\n" + b"x" * 45_000)
            time.sleep(0.2)
        refused = clients.pop().recv(1000)
        assert refused.startswith(b"HTTP/1.1 503"), refused
        assert source._held == 90_000
        for client in clients:
            assert client.recv(1000).startswith(b"HTTP/1.1 408"), "the rest did not come in time"
            client.close()
        assert source._held == 0
        large = b"x" * 300_000
        assert post(source.port, large) == (202, {"serial": "", "bytes": len(large)}), "one alone is taken"
        eventually(lambda: len(seen.frames) == 1)


def test_uploads_beyond_the_queue_are_asked_to_come_again() -> None:
    source = UploadSource(0)
    frames = source.frames(stop := threading.Event())
    puller = threading.Thread(target=lambda: next(frames, None))
    puller.start()
    eventually(answers(source.port))
    assert post(source.port, picture(0))[0] == 202
    puller.join(10)  # one was taken; nobody takes the next
    assert [post(source.port, picture(i))[0] for i in range(WAITING)] == [202] * WAITING
    code, body = post(source.port, picture())
    assert code == 503
    assert "send it again" in body["error"]
    stop.set()
    taken = [decode_image(frame.content).max() for frame in frames]
    assert taken == list(range(WAITING)), "what was acknowledged is handed over"


def test_a_slow_inspector_has_bounded_memory_and_counts_what_was_dropped() -> None:
    class Endless:
        def frames(self, stop: threading.Event) -> Iterator[Frame]:
            for number in range(1000):
                yield Frame(b"x", "now", str(number))

    buffer = FrameBuffer(capacity=4, policy="drop-oldest")
    fill(Endless(), buffer, threading.Event())
    left = [frame.serial for frame in iter(lambda: buffer.get(0.1), None)]
    assert left == ["996", "997", "998", "999"]
    assert buffer.dropped == 996
    assert buffer.done


def test_one_of_several_genicam_cameras_is_named_by_its_serial_number() -> None:
    named, first = source_named("genicam:/opt/maker/producer.cti#22-071"), source_named("genicam:/opt/maker/producer.cti")
    assert isinstance(named, GenicamSource)
    assert isinstance(first, GenicamSource)
    assert (named.producer, named.serial) == (first.producer, "22-071")
    assert first.serial == ""
