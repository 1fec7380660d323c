"""Which signal finds which fault in a user's own rows: faults planted in copies, measured, compared.

Knows no training.
"""
