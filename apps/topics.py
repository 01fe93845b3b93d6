"""The topics of all apps."""

from __future__ import annotations

from apps.finance.messages import TOPICS as FINANCE
from apps.industrial.messages import TOPICS as INDUSTRIAL
from apps.medical.messages import TOPICS as MEDICAL

TOPICS = (*MEDICAL, *FINANCE, *INDUSTRIAL)
