"""Many runs: sweeps, published tables, and studies of masks."""
