"""Benign or malignant, of 30 numbers a tumour (scikit-learn's breast_cancer), with an MLP.

ssfl run tumours.toml           in a folder with this file
"""

from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn


def tumours(path):
    """Return training and test patients, standardised."""
    x, y = load_breast_cancer(return_X_y=True)
    x, test_x, y, test_y = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    scale = StandardScaler().fit(x)
    return (scale.transform(x), y), (scale.transform(test_x), test_y)


def mlp(input_shape, outputs, norm, width=64):
    """Return an MLP with two hidden layers."""
    layers = [nn.Linear(input_shape[0], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))
