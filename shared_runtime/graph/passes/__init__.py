"""Rewrites of ONNX graphs, each verified as it is applied."""
