"""Where the lesion is, in volumes of 12 x 12 x 12 voxels: segmentation with a 3-D CNN.

ssfl run lesions.toml           in a folder with this file
"""

import numpy as np
from torch import nn

SIDE = 12


def scans(path, train=120, test=40):
    """Return volumes that are made here: noise, with a brighter ball somewhere; a voxel's class is 1 in the ball."""
    rng = np.random.default_rng(0)
    count = train + test
    centre, radius = rng.uniform(3, SIDE - 4, (count, 3)), rng.uniform(1.5, 3, count)
    grid = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"), axis=-1)
    y = (((grid - centre[:, None, None, None]) ** 2).sum(axis=-1) < radius[:, None, None, None] ** 2).astype(np.int64)
    x = (2 * y + rng.normal(0, 0.7, y.shape)).astype(np.float32)[:, None]
    return (x[:train], y[:train]), (x[train:], y[train:])


def cnn(input_shape, outputs, norm, width=16):
    """Return logits (batch, classes, depth, height, width) of volumes (batch, 1, depth, height, width)."""
    layers = []
    for channels in (input_shape[0], width):
        layers += [nn.Conv3d(channels, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv3d(width, outputs, 1))
