"""The published protocol and its metrics."""
