"""Transactions as tables: read, checked, generated, replayed."""
