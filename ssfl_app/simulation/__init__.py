"""One run on this machine: in this process, or on Ray."""
