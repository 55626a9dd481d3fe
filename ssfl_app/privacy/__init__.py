"""Secure aggregation and differential privacy: what a server learns of its clients, and its model tells of them."""
