"""Architectures as pure functions over plain parameter trees."""
