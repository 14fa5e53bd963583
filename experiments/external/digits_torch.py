"""scikit-learn's digits (1,797 images of 8x8) in PyTorch: an MLP 64-64-64-10 with batches of 64, by LoLO and by AdamW.

Needs scikit-learn and PyTorch:    pip install scikit-learn 'lolo[torch]'
Run:                               python experiments/external/digits_torch.py
"""

from functools import partial

import numpy as np
import torch
from rows import Make, experiment
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from lolo.torch.optimizer import LoLO

EVERY = 500  # steps between two held-out losses


def run(make: Make, seed: int, steps: int) -> tuple[np.ndarray, dict[int, float]]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images.astype(np.float32) / 16, labels, test_size=0.2, stratify=labels, random_state=0)
    x, x_held, y, y_held = (torch.tensor(part) for part in parts)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = make(model.parameters())
    losses, held = np.empty(steps), {}
    for step in range(1, steps + 1):
        batch = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step - 1] = loss.item()
        if step % EVERY == 0 or step == steps:
            with torch.no_grad():
                held[step] = nn.functional.cross_entropy(model(x_held), y_held).item()
    return losses, held


if __name__ == "__main__":
    title = "scikit-learn digits, MLP 64-64-64-10 in PyTorch, batch 64"
    experiment(run, partial(LoLO, weights="lolo-small"), torch.optim.AdamW, "digits-torch", title, seeds=3)
