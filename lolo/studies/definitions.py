"""The experiments behind the figures, as data."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Study:
    """Methods meta-trained on tasks with several seeds, and evaluated past their unroll."""

    about: str
    tasks: tuple[str, ...]  # meta-trained one by one; "a+b" is one meta-training on both
    methods: tuple[str, ...] = ("naive", "bc-only", "lolo")  # as `recipes.variant` reads them
    meta_seeds: int = 1
    eval_tasks: tuple[str, ...] = ()  # where the weights are evaluated; the meta-training's own task, if none is named
    eval_steps: int = 10_000
    eval_seeds: int = 5
    rivals: tuple[str, ...] = ("adamw:1e-3", "adamw:grid")
    deployments: tuple[tuple[str, str], ...] = ()  # (method, deployment settings of its weights): further rows
    as_meta_trained: bool = True  # whether there are rows without deployment settings
    changes: tuple[tuple[str, Any], ...] = ()  # recipe fields of every method that does not set them itself
    fixed: tuple[tuple[str, Any], ...] = ()  # recipe fields, whatever a method says


SMOKE = (
    ("outer.steps", 4),
    ("unroll.length", 100),
    ("unroll.truncation", 50),
    ("unroll.truncations_per_update", 1),
    ("estimator.pairs", 2),
    ("validation.every", 0),
)

NORM_FC_METHODS = ("norm-fc", "norm-fc learner.baseline=none", "norm-fc-bc-only", "norm-fc-naive")
FALLING = "schedule=warmup-cosine"
NORM_FC = Study(
    about="norm_fc with Newton-Schulz, three meta-seeds, on models that no meta-training met",
    tasks=("fashion-mlp+books-mlp",),
    methods=NORM_FC_METHODS,
    meta_seeds=3,
    eval_tasks=(
        "books-transformer:width=64,heads=4,context=32",
        "fashion-conv:widths=16-32",
        "fashion-mlp:widths=256-256",
    ),
    eval_steps=2000,
    eval_seeds=3,
    rivals=("adamw-warmup-cosine:grid", "muon-warmup-cosine:grid"),
    deployments=(
        *((method, FALLING) for method in NORM_FC_METHODS),
        ("norm-fc", f"{FALLING},learning_rate=2e-3"),
        ("norm-fc", f"{FALLING},untrained=true"),
        ("norm-fc learner.baseline=none", f"{FALLING},untrained=true"),
    ),
    as_meta_trained=False,
    changes=(("validation.every", 0), ("validation.tasks", ())),
)

DEFAULT_METHODS = ("norm-fc", "norm-fc-bc-only", "norm-fc-naive")
# As `lolo-norm-2` is, but for its weight decay; and with it.
SHIPPED_STEP = f"{FALLING},warmup=0.05,step_rms=adam,learning_rate=1.6e-2,adam_beta2=0.999"
SHIPPED_AS = f"{SHIPPED_STEP},weight_decay=0.1"
DEFAULT = dataclasses.replace(
    NORM_FC,
    about="norm_fc as `lolo-norm-2` is deployed, three meta-seeds, on models that no meta-training met",
    methods=DEFAULT_METHODS,
    rivals=("adamw-warmup-cosine:wide-grid", "muon-warmup-cosine:wide-grid"),
    deployments=(*((method, SHIPPED_AS) for method in DEFAULT_METHODS), ("norm-fc", f"{SHIPPED_AS},untrained=true")),
)

STUDIES: dict[str, Study] = {
    "quick": Study(
        about="one meta-seed, shortened meta-training: what a fresh machine shows within ten minutes",
        tasks=("fashion-mlp",),
        changes=(("outer.steps", 1000), ("validation.every", 0)),
    ),
    "books": Study(
        about="next character of English books, three meta-seeds",
        tasks=("books-mlp",),
        meta_seeds=3,
        changes=(("outer.steps", 2000),),
    ),
    "mini": Study(
        about="both embedded tasks at the paper's number of outer steps, three meta-seeds",
        tasks=("fashion-mlp", "books-mlp"),
        meta_seeds=3,
    ),
}

RIVALS = (
    "adamw:1e-3",
    "adamw:wide-grid",
    "adamw-cosine:wide-grid",
    "adamw-rsqrt:wide-grid",
    "adam:1e-3",
    "sgdm:grid",
)
FIGURE2 = ("naive", "replay-only", "bc-only", "lolo")
STABILISERS = "clock_limit=10000,weight_decay=0.1"
# Larger steps at first, smaller ones later; chosen on validation, with a weight decay that kept two of two φ stable for
# 100,000 steps. (`lolo-anytime` has half of it, which its own φ bears.)
ANYTIME = "clock_limit=10000,weight_decay=0.1,step_scale=2,step_decay=3000"
COSINE = "step_scale=2,schedule=cosine"
DEPLOYED = tuple(("lolo", words) for words in ("schedule=cosine", COSINE, ANYTIME))
SHORT = (("outer.steps", 1000), ("validation.every", 0))
TUNED = Study(
    about="LoLO against naive-LO at the best outer learning rate that `settings` found so far",
    tasks=(),
    methods=("naive outer.lr=0.001", "lolo"),
    meta_seeds=3,
    rivals=("adamw:1e-3",),
    changes=(("outer.steps", 2000),),
)
LONG_DEPLOYED = (STABILISERS, ANYTIME, f"clock_limit=10000,weight_decay=0.02,{COSINE}")
LONG = Study(
    about="ten times past the evaluation: 100 times the unroll, with and without stabilisers",
    tasks=(),
    methods=("naive", "bc-only", "lolo"),
    meta_seeds=3,
    eval_steps=100_000,
    eval_seeds=2,
    rivals=(
        "adamw:1e-3",
        "adamw:3e-3",
        "adamw-cosine:3e-3",
        "adamw-cosine:1e-2",
        "adamw-rsqrt:3e-3",
        "adamw-rsqrt:1e-2",
    ),
    deployments=(("naive", STABILISERS), *(("lolo", words) for words in LONG_DEPLOYED)),
    changes=(("outer.steps", 2000),),
)

STUDY: dict[str, Study] = {
    "figure2": Study(
        about="the paper's ablation on Fashion-MNIST 8×8: imitation and replay, each alone and together",
        tasks=("fashion-mlp",),
        methods=FIGURE2,
        meta_seeds=5,
        rivals=RIVALS,
        deployments=DEPLOYED,
        changes=(("outer.steps", 2000), ("validation.every", 0)),
    ),
    "figure2-books": Study(
        about="the paper's ablation on the next character of English books",
        tasks=("books-mlp",),
        methods=FIGURE2,
        meta_seeds=3,
        rivals=RIVALS,
        deployments=DEPLOYED,
        changes=(("outer.steps", 2000),),
    ),
    "naive-tuned": dataclasses.replace(
        TUNED, tasks=("fashion-mlp",), meta_seeds=5, changes=(*TUNED.changes, ("validation.every", 0))
    ),
    "naive-tuned-books": dataclasses.replace(TUNED, tasks=("books-mlp",)),
    "long": dataclasses.replace(LONG, tasks=("fashion-mlp",), changes=(*LONG.changes, ("validation.every", 0))),
    "long-books": dataclasses.replace(
        LONG,
        tasks=("books-mlp",),
        methods=("naive", "lolo"),
        deployments=tuple(("lolo", words) for words in LONG_DEPLOYED),
    ),
    "settings": Study(
        about="what matters: one setting of LoLO changed at a time, short meta-trainings, one meta-seed",
        tasks=("fashion-mlp",),
        methods=(
            "lolo",
            *(f"lolo replay.threshold={share}" for share in (0.05, 0.2, 0.5)),
            "bc-only",
            *(f"lolo replay.capacity={states}" for states in (1, 2, 8)),
            *(f"lolo replay.read={rule}" for rule in ("uniform", "newest", "pop")),
            *(f"lolo imitation.normalize={scope}" for scope in ("joint", "none")),
            "lolo imitation.alpha_loss=zero",
            "lolo imitation.alpha_loss=one",
            "lolo imitation.alpha_mix=one",
            "lolo imitation.alpha_mix=one imitation.alpha_loss=zero",
            *(f"lolo imitation.lr={lr}" for lr in (0.0003, 0.003)),
            "lolo imitation.lr=0.003 replay.threshold=0.2",
            "lolo outer.lr=0.001",
            "lolo unroll.stagger=True",
            *(f"lolo unroll.schedule={schedule}" for schedule in ("log-uniform", "uniform", "curriculum")),
            "lolo unroll.truncations_per_update=20 outer.steps=50",  # as many inner steps
            "naive",
            "naive outer.lr=0.0003 outer.final_lr=0.0001",
            *(f"naive outer.lr={lr}" for lr in (0.001, 0.01)),
            "naive unroll.schedule=log-uniform",
        ),
        rivals=("adamw:1e-3", "adamw:grid"),
        changes=SHORT,
    ),
    "settings-confirmed": Study(
        about="the three best of `settings`, with three meta-seeds",
        tasks=("fashion-mlp",),
        methods=("lolo", "lolo imitation.alpha_mix=one", "lolo imitation.lr=0.003", "lolo replay.capacity=8"),
        meta_seeds=3,
        rivals=("adamw:1e-3", "adamw:grid"),
        changes=SHORT,
    ),
    "outer-steps": Study(
        about="2,000 outer steps or 5,000",
        tasks=("fashion-mlp",),
        methods=("lolo", "lolo outer.steps=5000"),
        meta_seeds=3,
        rivals=("adamw:1e-3", "adamw:grid"),
        changes=(("outer.steps", 2000), ("validation.every", 0)),
    ),
    "restarts": Study(
        about="replay without imitation, at three shares of unrolls that start afresh",
        tasks=("fashion-mlp",),
        methods=("replay-only", *(f"replay-only replay.threshold={share}" for share in (0.02, 0.4))),
        meta_seeds=3,
        rivals=("adamw:1e-3",),
        changes=(("outer.steps", 2000), ("validation.every", 0)),
    ),
    "transfer": Study(
        about="meta-trained on two small tasks at once, used unchanged on models that were never seen",
        tasks=("fashion-mlp+books-mlp",),
        eval_tasks=("fashion-mlp:widths=128-128-128", "textures-mlp:batch=128,width=64,depth=2,score_examples=4096"),
        eval_seeds=3,
        rivals=(
            "adamw:3e-4",
            "adamw:1e-3",
            "adamw:3e-3",
            "adamw-cosine:3e-3",
            "adamw-rsqrt:3e-3",
            "adamw-rsqrt:1e-2",
        ),
        deployments=(("lolo", COSINE), ("lolo", ANYTIME)),
        changes=(("outer.steps", 2000),),
    ),
    "norm-fc": NORM_FC,
    "norm-fc-long": dataclasses.replace(
        NORM_FC, about="the same over five times as many steps", eval_steps=10_000, eval_seeds=2
    ),
    "default": DEFAULT,
    "default-long": dataclasses.replace(
        DEFAULT,
        about="the same over five times as many steps, with the shipped weight decay and with half of it",
        eval_steps=10_000,
        eval_seeds=2,
        deployments=(*DEFAULT.deployments, ("norm-fc", f"{SHIPPED_STEP},weight_decay=0.05")),
    ),
}
"""The parts of `lolo reproduce study`. They share the meta-trainings that they have in common."""
