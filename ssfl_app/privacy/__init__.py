"""Secure aggregation and differential privacy: what a server learns of clients, and what a model tells of them."""
