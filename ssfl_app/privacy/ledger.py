"""The ledger of a run: which releases were begun, on the disk before they are made.

A release counts from the moment it is begun. A run that is killed and resumed, or played again from an older
checkpoint, adds to what was spent; it never forgets. The file holds counts, the plan and the budget; no noise and no
key.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssfl_app.files import check_regular, write_json
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.privacy.accounting import Budget, Plan, epsilon

FILE = "privacy.json"
KINDS = ("discovery", "round")
SAME = 1e-3
"""Share by which numbers that other versions of libraries computed anew may differ from those in the file."""


class BudgetSpent(RunFailed):
    """A release would cost more than is left; it was not made."""


class Ledger:
    """What a run has spent of its budget.

    Attributes
    ----------
    plan : Plan
        What the run will release.
    budget : Budget
        What it may spend. Of a run that is resumed, that of its beginning: the noise stays the same.
    begun : dict
        Releases that were begun, by kind: "discovery" and "round".
    """

    def __init__(self, path: Path, plan: Plan, budget: Budget, begun: Mapping[str, int]) -> None:
        self._path, self.plan, self.budget, self.begun = path, plan, budget, dict(begun)
        self._planned = {"discovery": plan.searches, "round": plan.rounds}
        if self._excess(self._planned):
            raise ConfigError(f"{plan} spends epsilon {self._after(self._planned):.4g}; {budget} has less")

    @classmethod
    def start(cls, folder: Path, plan: Plan, budget: Budget) -> "Ledger":
        """Return the ledger of a run that begins in a folder; a ConfigError if there is one. Then `save` it."""
        ledger = cls(folder / FILE, plan, budget, dict.fromkeys(KINDS, 0))
        if ledger._path.exists():
            raise ConfigError(f"{ledger._path} is the ledger of another run; begin this one in another folder")
        return ledger

    def save(self) -> None:
        """Write it: a run that has begun has a ledger, and cannot be resumed without."""
        self._write(self.begun)

    @classmethod
    def resume(cls, folder: Path, plan: Plan, budget: Budget) -> "Ledger":
        """Read the ledger of the run in a folder, which goes on.

        Raises
        ------
        ConfigError
            It is missing or damaged, or was written for another plan or budget. Nothing was changed.
        """
        path, cure = folder / FILE, "what was spent is unknown; begin the run anew in another folder"
        try:
            check_regular(path)
            facts = json.loads(path.read_bytes())
            if facts.pop("sha256") != _digest(facts):
                raise ValueError("its digest is that of another content")
            theirs, spent, begun = Plan(**facts["plan"]), Budget(**facts["budget"]), facts["begun"]
            if list(begun) != list(KINDS) or any(type(count) is not int or count < 0 for count in begun.values()):
                raise ValueError(f"it has {begun}")
        except FileNotFoundError as error:
            raise ConfigError(f"{path} is missing: {cure}") from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror or error}): {cure}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path} is damaged ({error}): {cure}") from error
        if theirs != plan:
            raise ConfigError(f"{path} was written for {theirs}; this is {plan}")
        if any(abs(now - then) > SAME * then for now, then in zip(_numbers(budget), _numbers(spent), strict=True)):
            raise ConfigError(f"{path} was written for {spent}; this is {budget}")
        return cls(path, plan, spent, begun)

    @property
    def epsilon(self) -> float:
        """Epsilon so far, of what was begun."""
        return self._after(self.begun)

    def begin(self, kind: str) -> None:
        """Count a release, on the disk, before it is made.

        Raises
        ------
        BudgetSpent
            It would exceed the budget. It is not counted and must not be made.
        OSError
            The ledger cannot be written; the release must not be made.
        """
        if kind not in KINDS or (kind == "discovery" and not self.plan.discovery_multiplier):
            raise ValueError(f"a release is a {kind!r}; the plan has none")
        begun = self.begun | {kind: self.begun[kind] + 1}
        # What was planned is within the budget; to compose what was begun takes up to a second.
        if any(begun[each] > self._planned[each] for each in KINDS) and self._excess(begun):
            done = " and ".join(f"{count} of {name}" for name, count in self.begun.items() if count)
            raise BudgetSpent(
                f"the privacy budget is spent: one more {kind} after {done} makes epsilon {self._after(begun):.4g}; "
                f"it is at most {self.budget.epsilon:.4g}"
            )
        self._write(begun)
        self.begun = begun

    def _after(self, begun: Mapping[str, int]) -> float:
        spent = self.budget
        return epsilon(self.plan, spent.noise_multiplier, spent.delta, begun["round"], begun["discovery"])

    def _excess(self, begun: Mapping[str, int]) -> bool:
        return self._after(begun) > self.budget.epsilon * (1 + 1e-6)

    def _write(self, begun: Mapping[str, int]) -> None:
        facts = {"plan": asdict(self.plan), "budget": asdict(self.budget), "begun": dict(begun)}
        write_json(self._path, facts | {"sha256": _digest(facts)})


def _numbers(budget: Budget) -> tuple[float, ...]:
    return budget.epsilon, budget.delta, budget.noise_multiplier


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
