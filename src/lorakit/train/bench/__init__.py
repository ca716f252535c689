"""Measure one training step against another program's: same tokens, same start, one clock, a fresh process each.

Read `work.py` (what is done), `ours.py` and `peft.py` (who does it), `clock.py` (how it is timed), `limit.py` (what the
machine could do), `worker.py` (the process) and `compare.py` (many processes, and whether they computed the same).
"""
