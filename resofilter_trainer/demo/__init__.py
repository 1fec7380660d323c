"""The embedded demo: generated problems, a tiny base model, and the whole method on both. Knows no other data."""
