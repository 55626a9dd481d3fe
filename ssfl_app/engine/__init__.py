"""How a run is executed: everything in this process, or Flower's simulation on Ray."""
