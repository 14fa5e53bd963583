"""Meta-training: recipes, runs and their folders, checkpoints, plans, sweeps, and what is wrong with a run."""
