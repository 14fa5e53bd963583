"""Train a small model on Fashion-MNIST (8x8, in the package) with LoLO in place of torch.optim.AdamW.

python examples/torch_plain.py
"""

import torch
from torch import nn

from lolo.data import embedded
from lolo.torch import LoLO


def main(steps: int = 300) -> tuple[float, float]:
    """Returns: the loss of the first step, and the mean loss of the last ten."""
    torch.manual_seed(0)
    images, labels = (torch.tensor(x) for x in embedded.fashion_mnist()["train"])
    images = (images.float() - 73) / 85
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = LoLO(model.parameters())  # was: torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(images), (128,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-10:]) / len(losses[-10:])


if __name__ == "__main__":
    print("first and last loss: {:.3f} {:.3f}".format(*main()))
