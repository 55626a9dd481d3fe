"""LoRA adapters of a small language model, and nothing that knows of sparsity."""
