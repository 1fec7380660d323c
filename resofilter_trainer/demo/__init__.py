"""The embedded demo: generated problems, a tiny base model, and the whole method on them. Knows no other data."""
