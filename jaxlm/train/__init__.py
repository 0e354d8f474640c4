"""Training: adapters."""
