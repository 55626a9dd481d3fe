"""SSFL: one sparse mask, found before training from the saliency of every client (arXiv 2405.09037)."""
