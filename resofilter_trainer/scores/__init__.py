"""The records: a score for every row or token, where it comes from, and statistics of them. Knows no model."""
