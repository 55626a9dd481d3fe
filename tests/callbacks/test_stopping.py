import math

import pytest

from ssfl_app.callbacks.stopping import Progress, StopOptions, progress
from ssfl_app.config import parse
from ssfl_app.metrics import ACCURACY, Metric
from ssfl_app.options import ConfigError

ERROR = Metric("mean absolute error", share=False, higher=False)
ACCURACIES = ("central_accuracy", "local_accuracy_mean", "personal_accuracy_mean")


def records(*values: float | None) -> list[dict[str, float | None]]:
    rounds = [{"round": i, **dict.fromkeys(ACCURACIES), "central_accuracy": v} for i, v in enumerate(values, start=1)]
    return [{"round": 0}, *rounds]


def test_counts_evaluated_rounds_without_a_better_value() -> None:
    options = StopOptions(patience=2)
    assert progress(records(0.5, 0.6, 0.6, 0.4), options, ACCURACY) == Progress(2, 0.6, 2)
    assert progress(records(0.5, 0.6, 0.6, 0.7), options, ACCURACY) == Progress(4, 0.7, 0)
    assert progress(records(None, 0.6, None, None, 0.6), options, ACCURACY) == Progress(2, 0.6, 1)


def test_of_an_error_less_is_better() -> None:
    assert progress(records(3.0, 2.0, 2.5), StopOptions(), ERROR) == Progress(2, 2.0, 1)


@pytest.mark.parametrize("metric", [ACCURACY, ERROR])
def test_small_steps_count_once_they_add_up_to_more_than_the_least(metric: Metric) -> None:
    options, sign = StopOptions(min_delta=0.25), 1 if metric.higher else -1
    values = [sign * value for value in (0.0, 0.125, 0.25, 0.375)]
    assert [progress(records(*values[:n]), options, metric).since for n in (1, 2, 3, 4)] == [0, 1, 2, 0]
    assert progress(records(*values[:3]), options, metric).best == 3  # the best model is the best one all the same


@pytest.mark.parametrize("metric", [ACCURACY, ERROR])
def test_a_diverged_model_is_never_better(metric: Metric) -> None:
    now = progress(records(math.nan, math.inf, -math.inf), StopOptions(), metric)
    assert (now.best, now.since) == (0, 3)
    assert math.isnan(now.value)
    assert progress(records(math.nan, 0.5, math.nan), StopOptions(), metric) == Progress(2, 0.5, 1)


def test_whose_value_it_is() -> None:
    record = {"round": 1, "central_accuracy": None, "local_accuracy_mean": 0.25, "personal_accuracy_mean": 0.75}
    found = [progress([record], StopOptions(metric=m), ACCURACY) for m in ("auto", "central", "local", "personal")]
    assert [(now.best, now.value) for now in found if now.best] == [(1, 0.25), (1, 0.25), (1, 0.75)]
    assert found[1].since == 0


def test_a_strategy_that_needs_its_last_round_does_not_stop_early() -> None:
    with pytest.raises(
        ConfigError, match=r"stop.patience is 2; it is 0 here: fedavg-ft fine-tunes in the last round"
    ):
        parse({"strategy": "fedavg-ft", "stop.patience": 2})
