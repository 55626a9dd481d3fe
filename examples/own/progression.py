"""How far diabetes goes within a year, of 10 numbers a patient (scikit-learn's diabetes): regression with an MLP.

ssfl run progression.toml       in a folder with this file
"""

from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import nn


def patients(path):
    """Return training and test patients; a target is the progression in units of 100."""
    x, y = load_diabetes(return_X_y=True)
    x, test_x, y, test_y = train_test_split(20 * x, y / 100, test_size=0.2, random_state=0)
    return (x, y), (test_x, test_y)


def mlp(input_shape, outputs, norm, width=64):
    """Return an MLP with two hidden layers."""
    layers = [nn.Linear(input_shape[0], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))
