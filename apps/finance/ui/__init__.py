"""The page of the fraud analyst."""
