"""What simulation costs beside the training itself: ``python -m benchmarks.simulation.run``."""
