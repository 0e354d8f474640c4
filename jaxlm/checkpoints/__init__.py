"""Checkpoints on disk: names, tensors, files. Knows paths, shapes and dtypes, never a model."""
