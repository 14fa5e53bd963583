"""Benchmarks: speed on this machine, as ratios within one run, and textbook forms to compare with."""
