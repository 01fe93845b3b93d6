"""The kind of a defect, from few samples a kind."""
