"""The features of a transaction: their names, order and meaning. A model names the version it was trained on.

The first 15 are those of the protocol of Le Borgne, Siblini, Lebichot and Bontempi, "Reproducible Machine
Learning for Credit Card Fraud Detection - Practical Handbook" (ULB, 2022), under its names. The others are
ours. All are functions of the customer's last 30 days and of the terminal's last 37; a label is used only
when its transaction is at least seven days old, at event time.
"""

from __future__ import annotations

VERSION = "2"
SECOND = 1_000_000
"""Times are whole microseconds since the epoch, UTC."""
HOUR, DAY = 3600 * SECOND, 86_400 * SECOND
WINDOWS_DAYS = (1, 7, 30)
LABEL_DELAY = 7 * DAY
CUSTOMER_SPAN, TERMINAL_SPAN = 30 * DAY, 37 * DAY
HIGH = 3
"""A transaction is high where it exceeds the customer's median this many times."""
NEVER_DAYS = 60.0
"""What stands for "not in the window" where a feature is a time since an event [days]."""
FLOOR_MINOR = 100
"""Medians below this are taken as this in ratios [minor units], so that cents do not make large ratios."""

HANDBOOK = (
    "TX_AMOUNT",
    "TX_DURING_WEEKEND",
    "TX_DURING_NIGHT",
    *(f"CUSTOMER_ID_{kind}_{days}DAY_WINDOW" for days in WINDOWS_DAYS for kind in ("NB_TX", "AVG_AMOUNT")),
    *(f"TERMINAL_ID_{kind}_{days}DAY_WINDOW" for days in WINDOWS_DAYS for kind in ("NB_TX", "RISK")),
)
CUSTOMER = (
    "AMOUNT_TO_MEDIAN",
    "AMOUNT_TO_UPPER_QUARTILE",
    "CUSTOMER_MAX_TO_MEDIAN_1DAY",
    "CUSTOMER_MAX_TO_MEDIAN_7DAY",
    "CUSTOMER_MAX_TO_MEDIAN_14DAY",
)
TERMINAL = (
    "TERMINAL_NB_ORDINARY_FRAUD",
    "TERMINAL_NB_HIGH_FRAUD",
    "TERMINAL_DAYS_SINCE_FRAUD",
    "TERMINAL_DAYS_SINCE_GENUINE",
    "TERMINAL_FRAUD_RUN",
    "TERMINAL_DAYS_SINCE_RUN_START",
)
"""An ordinary fraud is one whose amount is not high for its customer: it speaks against the terminal, not the
card."""
FEATURES = (*HANDBOOK, *CUSTOMER, *TERMINAL)
INDEX = {name: position for position, name in enumerate(FEATURES)}
