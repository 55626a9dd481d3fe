"""Secure aggregation and differential privacy: what a server learns of its clients, and what its model tells of them."""
