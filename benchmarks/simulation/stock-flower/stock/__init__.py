"""FedAvg with Flower's own parts only: nothing here knows of sparsity."""
