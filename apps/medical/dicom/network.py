"""The DICOM network: a storage provider that collects series and hands each over when it is complete."""

from __future__ import annotations

import io
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence

from pydicom.dataset import FileDataset
from pydicom.filewriter import dcmwrite
from pynetdicom import AE, AllStoragePresentationContexts, _config, evt
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import Verification

from apps.medical.dicom.files import Instances, add_instance

logger = logging.getLogger(__name__)
SUCCESS, OUT_OF_RESOURCES, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xC000
MAX_PENDING_BYTES = 4 * 2**30
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

    `allowed`: calling AE titles that may associate; empty allows every one. What is pending when the
    provider closes is delivered then.
    """

    def __init__(
        self,
        deliver: Callable[[Instances, str], None],
        *,
        address: str,
        port: int,
        ae_title: str,
        allowed: Sequence[str] = (),
        quiet_seconds: float = 3.0,
    ) -> None:
        self._deliver, self._quiet = deliver, quiet_seconds
        self._address, self._port, self._title, self._allowed = address, port, ae_title, list(allowed)
        self._pending: dict[str, tuple[float, str, Instances]] = {}
        self._bytes = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def __enter__(self) -> StorageProvider:
        _config.UNRESTRICTED_STORAGE_SERVICE = False
        entity = AE(ae_title=self._title)
        entity.supported_contexts = [build_context(c.abstract_syntax, TRANSFER_SYNTAXES) for c in AllStoragePresentationContexts]
        entity.add_supported_context(Verification)
        entity.require_calling_aet = self._allowed
        entity.maximum_pdu_size = 0
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
        buffer = io.BytesIO()
        try:
            dataset = event.dataset
            dataset.file_meta = event.file_meta
            dcmwrite(buffer, dataset, enforce_file_format=True)
        except Exception as error:  # the peer's bytes: whatever the parser meets is its answer
            logger.warning("C-STORE with a data set that can't be read: %s", type(error).__name__)
            return CANNOT_UNDERSTAND
        content = buffer.getvalue()
        parsed = Instances()
        add_instance(parsed, str(event.request.AffectedSOPInstanceUID), content)
        if not parsed.datasets:
            return CANNOT_UNDERSTAND
        with self._lock:
            if self._bytes + len(content) > MAX_PENDING_BYTES:
                return OUT_OF_RESOURCES
            self._bytes += len(content)
            self._keep(parsed.datasets[0], str(event.assoc.requestor.ae_title))
        return SUCCESS

    def _keep(self, dataset: FileDataset, sender: str) -> None:
        uid = str(dataset.SeriesInstanceUID)
        _, _, instances = self._pending.get(uid, (0.0, sender, Instances()))
        instances.datasets.append(dataset)
        self._pending[uid] = (time.monotonic(), sender, instances)

    def _watch_series(self) -> None:
        while not self._stop.wait(min(0.5, self._quiet / 2)):
            self._flush(everything=False)

    def _flush(self, *, everything: bool) -> None:
        now = time.monotonic()
        with self._lock:
            ready = [uid for uid, (last, _, _) in self._pending.items() if everything or now - last >= self._quiet]
            taken = [self._pending.pop(uid) for uid in ready]
            if not self._pending:
                self._bytes = 0
        for _, sender, instances in taken:
            try:
                self._deliver(instances, sender)
            except Exception:
                logger.exception("a received series could not be handed over; it is kept and tried again")
                with self._lock:
                    self._pending[str(instances.datasets[0].SeriesInstanceUID)] = (now, sender, instances)
                if everything:
                    raise
