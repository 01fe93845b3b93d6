"""The medical pages."""
