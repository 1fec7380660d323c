"""Passes over a dataset: measure every row once, with any number of processes, and resume. Knows no Trainer."""
