"""From scores to decisions: keep or drop, with a reason, for every row or token. Knows arrays and tables, no models."""
