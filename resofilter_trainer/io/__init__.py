"""Writing and reading files, whole or not at all. Knows bytes and Parquet, not what they mean."""
