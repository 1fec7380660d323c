"""What other selectors measure of a sample, one function for each criterion. Knows models and batches, no dataset."""
