"""Federations of real SuperNodes: credentials, services, and what outsiders can reach."""
