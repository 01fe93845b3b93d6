"""Event times as text."""

from __future__ import annotations

from datetime import UTC, datetime

from apps.finance.features.schema import SECOND


def rfc3339(time_us: int) -> str:
    """Microseconds since the epoch -> RFC 3339 in UTC."""
    whole = datetime.fromtimestamp(time_us // SECOND, UTC).replace(microsecond=time_us % SECOND)
    return whole.isoformat().replace("+00:00", "Z")
