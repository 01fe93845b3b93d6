"""Joining requests into batches."""
