"""Small networks run whole: `program` and `lowering` make a program of a graph, `reference` defines what it does, `_cpu` does it fast."""
