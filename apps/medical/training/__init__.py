"""Training of the shipped medical models. Needs the `train` extra (torch, MONAI)."""
