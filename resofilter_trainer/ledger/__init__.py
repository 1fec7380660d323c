"""The ledger: which rows were behind each step of a run, and how each row was learnt. Knows numbers, no model."""
