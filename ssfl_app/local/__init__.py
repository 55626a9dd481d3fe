"""What a client does on its own machine: its images, its model and its training."""
