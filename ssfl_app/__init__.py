"""Sparse federated learning on Flower: SSFL and the systems it is compared with."""

__version__ = "0.1.0"
