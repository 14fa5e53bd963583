"""Optimizers side by side: long runs from the same inits and batches, and what their rows say."""
