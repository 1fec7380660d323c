"""Metrics as local `evaluate` modules: `evaluate.load(path)` reads them without a network."""
