"""Closed forms against what the machine computes: one function a check, collected in `selftest.py`."""
