"""Text from a model: sampling, the prefill and decode loop, streaming."""
