"""The callback inside other trainers, by their plugin interfaces. Knows their settings, and leaves the work to it."""
