"""Strategies whose rounds only their own `start` plays; whatever else Flower drives a strategy by is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from flwr.serverapp.strategy import Strategy


class OwnStart(Strategy):
    """A strategy that encodes its messages itself, so that nothing outside its `start` can read or change a round.

    A wrapper calls nothing of what it wraps when it is made. It is refused at the first of its rounds, before any
    message: noise that it adds to the model would never reach the clients.
    """

    _playing = False

    @contextmanager
    def playing(self) -> Iterator[None]:
        """Let rounds be played inside; `start` does all its work in it."""
        self._playing = True
        try:
            yield
        finally:
            self._playing = False

    def check_playing(self) -> None:
        """Raise TypeError unless `start` is running; every ``configure_...`` calls it first."""
        if self._playing:
            return
        name = type(self).__name__
        ours: Any = next(base for base in type(self).__mro__ if OwnStart in base.__bases__)
        if type(self).start is not ours.start:
            raise TypeError(
                f"{name}.start() plays rounds of its own; {ours.__name__}'s finds the mask: call super().start(...) "
                "in it, and put what happens in a round into the other methods"
            )
        raise TypeError(
            f"{name} plays its rounds in its own start(); Flower's Strategy.start and strategies that wrap another "
            "one, such as those for differential privacy, cannot: they would see encoded messages, and their noise "
            f"would be dropped. Call start() of {name}; clipping and noise belong into the ClientApp"
        )

    def initialize_parameters(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse what calls this first: Flower's old Server, its workflows (SecAgg+) and its old wrappers."""
        raise TypeError(
            f"{type(self).__name__} is a strategy of Flower's Message API; what is in flwr.server (ServerApp, the "
            "SecAgg+ workflow, wrappers) cannot play it: use flwr.serverapp.ServerApp, and call start() in its main"
        )
