"""The method of the paper, to be read beside it: `meta` is Algorithm 1, `inner` one inner step, the rest its parts."""
