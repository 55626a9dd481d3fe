"""Scripts that measure; a package, since others install one of this name, and the first on the path counts."""
