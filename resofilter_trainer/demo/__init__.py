"""The embedded demo: problems that it makes, a tiny base model that it ships, and the whole method on them."""
