"""Agreement of a segmentation with a reference, and its uncertainty."""
