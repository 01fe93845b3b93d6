"""Graphs: how they are made from other forms."""
