"""Training of the two models and their combination."""
