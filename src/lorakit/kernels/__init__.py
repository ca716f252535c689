"""Fused operations of a training step, in plain torch. Each file has its slow twin, `reference`, with the same signature.

`triton_ops.py` has four of them again for GPUs, and `choice.py` finds out which to use.
"""
