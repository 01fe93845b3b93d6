"""Engines that run a model: one module each, found by the entry points `triscope.backends`."""
