"""A table with all that training and testing ask of it, computed once."""

from __future__ import annotations

import numpy as np
import polars as pl

from apps.finance.features.batch import batch_features
from apps.finance.features.schema import FEATURES
from apps.finance.features.sequence import sequence_rows
from apps.finance.training.train import known_compromised


class Prepared:
    """A table with its features, sequences and what the folds ask of it, computed once.

    A transaction without a label is history to the others, as in the stream; where `labelled` is False nothing is learned from it.
    """

    def __init__(self, transactions: pl.DataFrame) -> None:
        self.table = batch_features(transactions)
        self.features = self.table.select(FEATURES).to_numpy().astype(np.float32)
        self.rows = sequence_rows(self.table)
        self.labelled = self.table["TX_FRAUD"].is_not_null().to_numpy()
        self.labels = self.table["TX_FRAUD"].fill_null(0).to_numpy().astype(np.int64)
        self.customers = self.table["CUSTOMER_ID"].to_numpy()
        self.days = self.table["TX_DATETIME"].dt.date().cast(pl.Int32).to_numpy().astype(np.int64)
        self.known = known_compromised(self.customers, self.days, self.labels == 1)
