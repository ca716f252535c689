"""One file per method: its formula, its hyper-parameters (a frozen dataclass) and its adapter. The file name is the method's name."""
