"""Faults on real SuperNodes, on purpose, and what they cost: ``python -m benchmarks.drills``."""
