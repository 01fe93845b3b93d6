"""Training of the shipped network and of recipes with labelled defects. Needs the `train` extra (torch)."""
