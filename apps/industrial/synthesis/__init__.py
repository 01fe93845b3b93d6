"""Procedural parts and defects, our own code: for the demo, for training, and to teach a recipe what a defect may look like."""
