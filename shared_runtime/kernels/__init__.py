"""Kernels of our own, where no engine's is as fast: one folder each, with a reference in numpy and what runs it on a device."""
