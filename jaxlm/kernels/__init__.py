"""Attention: the mask language, the one entry, and its implementations."""
