"""The heart: what an adapter is (`adapter.py`), what a layer's matrix is (`kinds.py`), how one meets the other (`attach.py`)."""
