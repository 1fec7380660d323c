"""Token cleaning: which tokens of a dataset are learnt, by a base and a reference model. Knows no Trainer."""
