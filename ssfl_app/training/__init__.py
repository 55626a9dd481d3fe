"""What a client does with its model: local training, models, and what makes it fast."""
