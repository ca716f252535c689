"""The theory of low-rank adapters as formulas on tensors: no model, no file, everything in double precision.

One idea per file. Each formula is listed once in `formulas.py` with the conditions under which it holds, its source and the
check that proves it (`lorakit selftest`); what a user sees of it is a `Number`.
"""
