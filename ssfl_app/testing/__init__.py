"""The contract test for strategies of your own: ``pytest --pyargs ssfl_app.testing --strategy mine:Mine``."""
