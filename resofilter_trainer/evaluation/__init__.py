"""How well a trained model answers: generation, metrics, tasks. Knows models and tokenizers, no scores."""
