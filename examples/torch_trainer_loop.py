"""A loop as Lightning's or Hugging Face's trainer has it: the module makes optimizer and scheduler, the loop drives."""

import torch
from torch import nn

from lolo.data import embedded
from lolo.torch import LoLO


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(16 * 36, 10)

    def training_step(self, images, labels):
        return nn.functional.cross_entropy(self.head(self.body((images.float() - 73) / 85)), labels.long())

    def configure_optimizers(self, steps):
        optimizer = LoLO(self.parameters())
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)


def main(steps: int = 200) -> tuple[float, float]:
    """Returns: the loss of the first step, and the mean loss of the last ten."""
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(*(torch.tensor(x) for x in embedded.fashion_mnist()["train"]))
    loader, module, losses = torch.utils.data.DataLoader(data, 128, shuffle=True), Classifier(), []
    optimizer, scheduler = module.configure_optimizers(steps)
    for _, batch in zip(range(steps), loader, strict=False):
        (loss := module.training_step(*batch)).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], sum(losses[-10:]) / len(losses[-10:])


if __name__ == "__main__":
    print("first and last loss: {:.3f} {:.3f}".format(*main()))
