"""Secure aggregation and differential privacy: what a server learns of its clients, and what a model tells."""
