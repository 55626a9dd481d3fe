"""What was spent is on the disk before a release, and is never forgotten."""

import json

import pytest

from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.privacy import ledger as ledgers
from ssfl_app.privacy.accounting import Budget, Plan, epsilon
from ssfl_app.privacy.ledger import FILE, BudgetSpent, Ledger

PLAN = Plan(3, 0.5, discovery_multiplier=4.0)
BUDGET = Budget(epsilon(PLAN, 3.0, 1e-3), 1e-3, 3.0)


def started(folder, plan, budget):
    """Return the ledger of a run that has begun."""
    ledger = Ledger.start(folder, plan, budget)
    ledger.save()
    return ledger


def on_disk(folder):
    return json.loads((folder / FILE).read_text())["begun"]


def test_a_release_is_on_the_disk_when_it_may_be_made(tmp_path):
    ledger = started(tmp_path, PLAN, BUDGET)
    assert ledger.epsilon == 0.0
    for kind, wanted in (("discovery", (1, 0)), ("round", (1, 1)), ("round", (1, 2))):
        ledger.begin(kind)
        assert (on_disk(tmp_path)["discovery"], on_disk(tmp_path)["round"]) == wanted
        assert ledger.epsilon == epsilon(PLAN, 3.0, 1e-3, wanted[1], wanted[0])


def test_it_holds_counts_the_plan_and_the_budget_only(tmp_path):
    started(tmp_path, PLAN, BUDGET)
    facts = json.loads((tmp_path / FILE).read_text())
    assert set(facts) == {"plan", "budget", "begun", "sha256"}
    assert (Plan(**facts["plan"]), Budget(**facts["budget"])) == (PLAN, BUDGET)


def test_a_release_beyond_the_budget_is_refused_before_it_is_made(tmp_path):
    ledger = started(tmp_path, PLAN, BUDGET)
    for kind in ("discovery", "round", "round", "round"):
        ledger.begin(kind)
    assert ledger.epsilon == BUDGET.epsilon
    with pytest.raises(BudgetSpent, match=r"spent: one more round after 1 of discovery and 3 of round makes epsilon"):
        ledger.begin("round")
    assert on_disk(tmp_path) == {"discovery": 1, "round": 3}
    assert ledger.epsilon == BUDGET.epsilon
    assert issubclass(BudgetSpent, RunFailed)


def test_a_run_that_is_played_again_pays_again(tmp_path):
    started(tmp_path, PLAN, BUDGET).begin("round")
    # Killed in round 1, and resumed from before it.
    again = Ledger.resume(tmp_path, PLAN, BUDGET)
    assert again.epsilon == epsilon(PLAN, 3.0, 1e-3, 1, 0)
    for kind in ("discovery", "round", "round"):
        again.begin(kind)
    with pytest.raises(BudgetSpent):
        Ledger.resume(tmp_path, PLAN, BUDGET).begin("round")


def test_a_second_search_is_paid_with_rounds(tmp_path):
    ledger = started(tmp_path, PLAN, BUDGET)
    for kind in ("discovery", "discovery", "round"):
        ledger.begin(kind)
    left = next(done for done in (1, 2, 3) if epsilon(PLAN, 3.0, 1e-3, done + 1, 2) > BUDGET.epsilon)
    assert left < PLAN.rounds
    for _ in range(left - 1):
        ledger.begin("round")
    with pytest.raises(BudgetSpent, match=rf"one more round after 2 of discovery and {left} of round makes epsilon"):
        ledger.begin("round")


def test_a_plan_beyond_the_budget_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"spends epsilon .*has less"):
        Ledger.start(tmp_path, PLAN, Budget(0.9 * BUDGET.epsilon, 1e-3, 3.0))
    assert not (tmp_path / FILE).exists()


def test_a_release_that_cannot_be_written_is_not_counted_and_not_made(tmp_path, monkeypatch):
    ledger = started(tmp_path, PLAN, BUDGET)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledgers, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        ledger.begin("round")
    assert ledger.begun == on_disk(tmp_path) == {"discovery": 0, "round": 0}


def damaged(content):
    yield content[: len(content) // 2]
    yield b"{}"
    yield b"[" * 100_000
    yield content.replace(b'"round": 1', b'"round": 0')
    facts = json.loads(content)
    for begun in ({"round": 1}, {"discovery": 0, "round": -1}, {"discovery": 0, "round": True}):
        forged = {"plan": facts["plan"], "budget": facts["budget"], "begun": begun}
        yield json.dumps(forged | {"sha256": ledgers._digest(forged)}).encode()


def test_a_damaged_ledger_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / FILE
    started(tmp_path, PLAN, BUDGET).begin("round")
    cases = list(damaged(path.read_bytes()))
    assert len(cases) == 7
    for content in cases:
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{FILE} is damaged .*begin the run anew in another folder"):
            Ledger.resume(tmp_path, PLAN, BUDGET)
        assert path.read_bytes() == content


def test_a_missing_ledger_is_refused_and_not_begun_again(tmp_path):
    with pytest.raises(ConfigError, match=rf"{FILE} is missing: what was spent is unknown"):
        Ledger.resume(tmp_path, PLAN, BUDGET)
    (tmp_path / FILE).mkdir()
    with pytest.raises(ConfigError, match=rf"{FILE} cannot be read \(no regular file\)"):
        Ledger.resume(tmp_path, PLAN, BUDGET)


def test_a_ledger_of_another_run_is_refused(tmp_path):
    started(tmp_path, PLAN, BUDGET)
    with pytest.raises(ConfigError, match="was written for Plan"):
        Ledger.resume(tmp_path, Plan(4, 0.5, discovery_multiplier=4.0), BUDGET)
    for other in (Budget(2 * BUDGET.epsilon, 1e-3, 3.0), Budget(BUDGET.epsilon, 1e-3, 2.0)):
        with pytest.raises(ConfigError, match="was written for Budget"):
            Ledger.resume(tmp_path, PLAN, other)
    with pytest.raises(ConfigError, match="is the ledger of another run"):
        Ledger.start(tmp_path, PLAN, BUDGET)


def test_noise_that_other_versions_of_a_library_would_round_otherwise_stays_what_it_was(tmp_path):
    started(tmp_path, PLAN, BUDGET)
    again = Ledger.resume(tmp_path, PLAN, Budget(BUDGET.epsilon, 1e-3, 3.0001))
    assert again.budget == BUDGET


def test_a_release_that_is_not_planned_is_a_mistake(tmp_path):
    ledger = started(tmp_path, Plan(3, 0.5), BUDGET)
    for kind in ("discovery", "loss"):
        with pytest.raises(ValueError, match=f"a release is a '{kind}'; the plan has none"):
            ledger.begin(kind)
