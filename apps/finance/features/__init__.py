"""Features of a transaction, computed as a batch and as a stream."""
