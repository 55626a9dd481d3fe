"""The model, the data of one partition, and how they are trained and tested."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from ssfl_app import mask_gradients


class Net(nn.Module):
    """A small CNN for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 4 * 4, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, shape (images, 10), of images, shape (images, 1, 8, 8)."""
        x = torch.relu(self.conv1(x))
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def load_data(partition: int, partitions: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return training images, their labels, test images, their labels of one of several equal parts of the digits."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))[partition::partitions]
    images = torch.tensor(digits.images[order], dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target[order])
    cut = len(order) * 4 // 5
    return images[:cut], labels[:cut], images[cut:], labels[cut:]


def train(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, lr: float) -> float:
    """Train with SGD, and return the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    net.train()
    losses = []
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(16):
            loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            mask_gradients(net)
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def test(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return loss and accuracy."""
    net.eval()
    with torch.no_grad():
        logits = net(images)
    loss = nn.functional.cross_entropy(logits, labels).item()
    return loss, (logits.argmax(1) == labels).float().mean().item()
