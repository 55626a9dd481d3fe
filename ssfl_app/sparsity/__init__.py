"""What exists only for sparsity: masks, scores, and the encodings that make bytes out of both."""
