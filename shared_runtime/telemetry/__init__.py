"""What the runtime measures of itself while it works."""
