"""What good parts look like, and how far an image is from it."""
