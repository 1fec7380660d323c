"""What several tests stand on. Tests import from here, never from each other."""
