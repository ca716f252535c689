"""One file per start value of the factors: `start(A, B, site)` fills A (r, in) and B (out, r). The file name is the init's name."""
