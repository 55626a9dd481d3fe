"""What every algorithm stands on: its server half, its client half, the rounds, and the aggregation of replies."""
