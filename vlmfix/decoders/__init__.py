"""One file per method: the mathematics of one paper."""
