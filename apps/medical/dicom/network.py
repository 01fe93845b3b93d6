"""The DICOM network: a storage provider that collects series and hands each over when it is complete.

An instance is on disk before its C-STORE is answered with success, and leaves it when its series was handed
over; what a killed listener had acknowledged is handed over by the next one.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from pydicom import dcmread
from pydicom.filewriter import dcmwrite
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.dsutils import encode_file_meta
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import Verification

from apps.medical.dicom.files import Instances, add_instance, read_instances
from pipelines import UnavailableError

logger = logging.getLogger(__name__)
SUCCESS, OUT_OF_RESOURCES, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xC000
RESERVE_BYTES = 2**30
"""Below this much free disk an instance is answered with 'out of resources', and the sender keeps it."""
MOST_PDU_BYTES = 2**20
"""A sender puts a whole instance into one unit where it may, and that is in memory four times while it is decoded."""
SENDER_FILE, UNFINISHED = "sender", ".part"
PREAMBLE = b"\x00" * 128 + b"DICM"
TRANSFER_SYNTAXES = [
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.1.99",
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51",
    "1.2.840.10008.1.2.4.57",
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.81",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
    "1.2.840.10008.1.2.5",
]


class StorageProvider:
    """Receives C-STORE and C-ECHO. A series that was silent for `quiet_seconds` goes to `deliver`.

    `spool`: folder for what was received and not yet handed over. `allowed`: calling AE titles that may
    associate; empty allows every one. What is pending when the provider closes is delivered then.
    """

    def __init__(
        self,
        deliver: Callable[[Instances, str], None],
        *,
        spool: Path,
        address: str,
        port: int,
        ae_title: str,
        allowed: Sequence[str] = (),
        quiet_seconds: float = 3.0,
    ) -> None:
        self._deliver, self._quiet, self._spool = deliver, quiet_seconds, spool
        self._address, self._port, self._title, self._allowed = address, port, ae_title, list(allowed)
        self._last: dict[Path, float] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def __enter__(self) -> StorageProvider:
        self._spool.mkdir(parents=True, exist_ok=True)
        for part in self._spool.rglob(f"*{UNFINISHED}"):
            part.unlink()
        self._last = {folder: time.monotonic() for folder in self._spool.iterdir() if folder.is_dir()}
        entity = AE(ae_title=self._title)
        entity.supported_contexts = [build_context(c.abstract_syntax, TRANSFER_SYNTAXES) for c in AllStoragePresentationContexts]
        entity.add_supported_context(Verification)
        entity.require_calling_aet = self._allowed
        entity.maximum_pdu_size = MOST_PDU_BYTES
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_CONN_OPEN, self._undelayed)]
        self._server = entity.start_server((self._address, self._port), block=False, evt_handlers=handlers)
        self._port = self._server.server_address[1]
        self._watch = threading.Thread(target=self._watch_series, name="dicom-series", daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._stop.set()
        self._watch.join(timeout=5)
        self._flush(everything=True)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._port

    def _undelayed(self, event: evt.Event) -> None:
        """Answer at once: delayed acknowledgement costs 40 ms an instance otherwise."""
        sock = event.assoc.dul.socket.socket
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _store(self, event: evt.Event) -> int:
        part = self._spool / f"{uuid.uuid4().hex}{UNFINISHED}"
        try:
            received = event.request.DataSet.getbuffer()
            if shutil.disk_usage(self._spool).free < RESERVE_BYTES + len(received):
                return OUT_OF_RESOURCES
            with part.open("wb") as stream:  # as it was sent, and once in memory
                stream.write(PREAMBLE + encode_file_meta(event.file_meta))
                stream.write(received)
                stream.flush()
                os.fsync(stream.fileno())
            header, parsed = io.BytesIO(), Instances()
            dcmwrite(header, dcmread(part, stop_before_pixels=True), enforce_file_format=True)  # fails where a value can't be read
            add_instance(parsed, str(event.request.AffectedSOPInstanceUID), header.getvalue())
            if not parsed.datasets:
                logger.warning("C-STORE with a data set that can't be read: %s", parsed.skipped[0][1])
                return CANNOT_UNDERSTAND
            instance = parsed.datasets[0]
            self._keep(part, str(instance.SeriesInstanceUID), str(instance.SOPInstanceUID), str(event.assoc.requestor.ae_title))
        except OSError as error:
            logger.error("an instance could not be kept: %s", error)
            return OUT_OF_RESOURCES
        except Exception as error:  # the peer's bytes: whatever the parser meets is its answer
            logger.warning("C-STORE with a data set that can't be read: %s", type(error).__name__)
            return CANNOT_UNDERSTAND
        finally:
            part.unlink(missing_ok=True)
        return SUCCESS

    def _keep(self, part: Path, series: str, instance: str, sender: str) -> None:
        """Put an instance to its series; names are hashes, as UIDs come from outside."""
        folder = self._spool / hashlib.sha256(series.encode()).hexdigest()[:32]
        name = hashlib.sha256(instance.encode()).hexdigest()[:32]
        with self._lock:
            folder.mkdir(exist_ok=True)
            (folder / SENDER_FILE).write_text(sender)
            part.replace(folder / f"{name}.dcm")
            self._last[folder] = time.monotonic()

    def _watch_series(self) -> None:
        while not self._stop.wait(min(0.5, self._quiet / 2)):
            self._flush(everything=False)

    def _flush(self, *, everything: bool) -> None:
        now = time.monotonic()
        with self._lock:
            ready = [folder for folder, last in self._last.items() if everything or now - last >= self._quiet]
            # Renamed, a series that goes on arriving starts a folder of its own.
            taken = []
            for folder in ready:
                del self._last[folder]
                moved = (
                    folder if folder.suffix == ".ready" else folder.rename(folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:8]}.ready"))
                )
                taken.append(moved)
        for folder in taken:
            self._hand_over(folder)

    def _hand_over(self, folder: Path) -> None:
        try:
            sender_file = folder / SENDER_FILE
            sender = sender_file.read_text() if sender_file.exists() else "unknown"
            instances = read_instances(folder)
            if instances.datasets:
                self._deliver(instances, sender)
            shutil.rmtree(folder)
        except Exception as error:
            if isinstance(error, UnavailableError):
                logger.warning("a received series is kept and tried again: %s", error)
            else:
                logger.exception("a received series could not be handed over; it is kept and tried again")
            with self._lock:
                self._last[folder] = time.monotonic()
