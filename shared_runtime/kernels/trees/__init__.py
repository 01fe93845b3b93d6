"""Ensembles of decision trees: `ensemble` reads them from a graph, `reference` defines what they compute, `_cpu` computes it fast."""
