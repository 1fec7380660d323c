"""Scores of rows and tokens, what they were made from, and their statistics. Knows no model."""
