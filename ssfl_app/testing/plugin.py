"""What pytest loads with this package: the options that name the strategy of the contract test."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("ssfl_app", "the contract test of ssfl_app.testing")
    group.addoption("--strategy", metavar="MODULE:CLASS", help="the strategy that it plays, by its address or name")
    group.addoption("--strategy-keys", metavar="KEYS", default="", help="under which it learns: 'run.rounds=6'")


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder in which pytest was started importable, as `ssfl run` does."""
    if config.getoption("--strategy"):
        from ssfl_app.registry import import_from

        import_from(Path.cwd())
