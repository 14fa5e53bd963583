"""Learned optimizers in JAX: from meta-parameters φ to an optax optimizer. Nothing here knows of meta-training."""
