"""Card transactions: features, scores with reasons, alerts within a daily budget."""
