"""Token cleaning: a base and a reference model decide which tokens of a dataset are learnt. Knows no Trainer."""
