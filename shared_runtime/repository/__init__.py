"""Where models live on disk."""
