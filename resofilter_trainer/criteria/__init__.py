"""What other selectors measure of a sample, one function per criterion. Knows models and batches, but no dataset."""
