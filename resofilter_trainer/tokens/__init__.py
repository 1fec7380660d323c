"""Token cleaning: a rule decides which tokens of a dataset are learnt, by a model or two. Knows no Trainer."""
