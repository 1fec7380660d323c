"""How well a trained model answers: generation, metrics, tasks. Knows nothing of scores."""
