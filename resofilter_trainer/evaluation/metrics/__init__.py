"""Metrics as local `evaluate` modules, which `evaluate.load(path)` reads without a network."""
