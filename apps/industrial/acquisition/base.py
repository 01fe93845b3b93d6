"""A source yields frames; a bounded buffer stands between it and an inspector that may be slower."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

Policy = Literal["drop-oldest", "drop-newest", "wait"]


@dataclass(frozen=True)
class Frame:
    """One picture of a part. `content`: the encoded image; `time`: RFC 3339; `serial`: the part's number, or empty."""

    content: bytes
    time: str
    serial: str = ""


class Source(Protocol):
    """Yields frames until it has no more or `stop` is set. Raises SourceError where it can't be opened."""

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """The frames, in the order in which they were taken."""
        ...


class FrameBuffer:
    """At most `capacity` frames between two threads. `dropped` counts what the policy let go."""

    def __init__(self, capacity: int = 16, policy: Policy = "wait") -> None:
        self._frames: deque[Frame] = deque()
        self._capacity, self._policy = capacity, policy
        self._changed = threading.Condition()
        self._closed = False
        self.dropped = 0

    def put(self, frame: Frame) -> bool:
        """Add a frame; False where it (drop-newest) was let go, or the buffer is closed."""
        with self._changed:
            if self._policy == "wait":
                self._changed.wait_for(lambda: len(self._frames) < self._capacity or self._closed)
            if self._closed:
                return False
            if len(self._frames) >= self._capacity:
                self.dropped += 1
                if self._policy == "drop-newest":
                    return False
                self._frames.popleft()
            self._frames.append(frame)
            self._changed.notify_all()
            return True

    def get(self, timeout: float | None = None) -> Frame | None:
        """The oldest frame; None after `timeout` seconds, or once the buffer is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._frames) or self._closed, timeout)
            if not self._frames:
                return None
            frame = self._frames.popleft()
            self._changed.notify_all()
            return frame

    def close(self) -> None:
        """No more frames come; waiting threads go on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def done(self) -> bool:
        """Whether it is closed and empty."""
        with self._changed:
            return self._closed and not self._frames


def fill(source: Source, buffer: FrameBuffer, stop: threading.Event) -> None:
    """Run `source` into `buffer` until it ends, soon after `stop`; for a thread of its own."""
    try:
        for frame in source.frames(stop):
            buffer.put(frame)
    finally:
        buffer.close()
