"""One file per start value of the factors: `start(A, B, base)` fills A (r, in) and B (out, r). The file name is the init's name."""
