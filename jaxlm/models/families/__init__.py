"""One file per config.json "model_type"."""
