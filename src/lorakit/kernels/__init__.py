"""Fused operations of a training step, in plain torch. Each file has its slow twin, `reference`, with the same signature."""
