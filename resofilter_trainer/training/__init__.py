"""Measuring and filtering inside a Trainer's run. The Trainer's internals are known in `trainer_access` alone."""
