"""Smaller and faster forms of a model, and the guard that lets them pass."""
