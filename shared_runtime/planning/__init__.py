"""Choosing, by measurement, what runs a model on this host."""
