"""Handwritten digits, a small CNN, and nothing that knows of sparsity."""
