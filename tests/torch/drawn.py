"""φ that several tests share."""

import numpy as np

from lolo.optimizers import small_fc_spec as spec


def draw_meta_params(hidden=32, seed=0, learn_decays=False):
    """φ with biases, and decay offsets, that are not zero, so that none can be forgotten."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) / np.sqrt(shape[0] if name[0] == "w" else 100)).astype(np.float32) * scale
        for name, shape in spec.weight_shapes(hidden, learn_decays=learn_decays).items()
        for scale in [np.float32(0.5 if name.endswith("decays") else 1.0)]
    }


def following_momentum():
    """φ that needs no meta-training: d is the normalised momentum of decay 0.999."""
    phi = {name: np.zeros(shape, np.float32) for name, shape in spec.weight_shapes(2).items()}
    phi["w0"][4], phi["w1"][0, 0], phi["w1"][1, 1], phi["w2"][:, 0] = (1, -1), 1, 1, (1, -1)
    return phi
