"""φ that several tests share."""

import numpy as np

from lolo.files import tensors
from lolo.optimizers import norm_fc_spec
from lolo.optimizers import small_fc_spec as spec
from lolo.optimizers.weights_file import WeightsFile


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


def draw_norm_fc(hidden=8, seed=0):
    """φ of norm_fc, no bias of which is zero."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) / np.sqrt(shape[0] if name[0] == "w" else 100)).astype(np.float32)
        for name, shape in norm_fc_spec.weight_shapes(hidden).items()
    }


def norm_fc_file(meta_params=None, **learner):
    """Weights of norm_fc with settings of their own."""
    meta_params = draw_norm_fc() if meta_params is None else meta_params
    learner = {
        **{"name": "norm_fc", "hidden": len(meta_params["b0"]), "learning_rate": 1e-3, "weight_decay": 0.0},
        **{"orthogonal": True, "baseline": "momentum", "step_rms": "one", "adam_scale": 1.0},
        **learner,
    }
    return WeightsFile(dict(meta_params), learner, {}, {}, tensors.digest(meta_params))
