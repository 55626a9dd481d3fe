"""How a run is executed: Flower's simulation on Ray, or everything in this process."""
