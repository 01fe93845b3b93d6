"""Accuracy on data sets in the MVTec layout."""
