"""What every algorithm stands on: its server side, its client side, the rounds, and the aggregation of replies."""
