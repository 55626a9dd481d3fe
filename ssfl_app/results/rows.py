"""The tables about runs: what each column says."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssfl_app.metrics import ACCURACY, Metric, common
from ssfl_app.results.run_folder import (
    CENTRAL,
    LOCAL,
    MB,
    PERSONAL,
    Run,
    cumulative_hours,
    cumulative_mb,
    has_clock,
    metadata,
    run_names,
)
from ssfl_app.results.table import NONE, Table, hours, in_metric, megabytes, ratio, shown

_COMPARE = (
    ("Run", "Strategy", "Data", "Partition", "Density", "Seed"),
    ("MB discovery", "MB train down", "MB train up", "x fewer than dense", "Lost", "Refused", "Seconds"),
)
_ROUND = (
    ("Round", "Cohort", "OK", "Lost", "Refused", "Train loss", "Central loss"),
    ("MB down", "MB up", "MB so far", "Seconds"),
)

SIMULATED = "Simulated hours"


def _headers(around: tuple[tuple[str, ...], tuple[str, ...]], metric: Metric) -> list[str]:
    return [*around[0], *(f"{what} {metric.column}" for what in ("Central", "Local mean", "Personal")), *around[1]]


def compare_table(runs: Sequence[Run]) -> Table:
    """Return one row a run; "x fewer than dense" counts training alone; where metrics differ, values say which."""
    rows, metric, clock = [], common(run.metric for run in runs), any(map(has_clock, runs))
    for run, name in zip(runs, run_names(runs), strict=True):
        known = metadata(run)
        discovery = _sum(known, "bytes_discovery_down", "bytes_discovery_up")
        fewer = ratio(known.get("bytes_dense_train"), _sum(known, "bytes_train_down", "bytes_train_up"))
        texts = [name if run.summary else f"{name} (unfinished)"]
        texts += [shown(known[key]) for key in ("strategy", "dataset", "partition")]
        numbers = [shown(known["density"], ".3g"), shown(known["seed"])]
        own = "" if run.metric == metric else f"{run.metric.unit} {run.metric.name}"
        found = [known[key] for key in (CENTRAL, LOCAL, PERSONAL)]
        numbers += [in_metric(value, run.metric) + own * (value is not None) for value in found]
        sizes = discovery, known["bytes_train_down"], known["bytes_train_up"]
        numbers += [*map(megabytes, sizes), fewer, shown(known["lost_replies"]), shown(known["refused_replies"])]
        numbers += [shown(known["seconds_total"], ",.1f")]
        rows.append([*texts, *numbers, *([hours(known.get("simulated_hours"))] if clock else [])])
    return Table(_headers(_COMPARE, metric) + [SIMULATED] * clock, rows, texts=4)


def summary_table(known: Mapping[str, Any], folder: Path | None = None, metric: Metric = ACCURACY) -> Table:
    """Return the names and values of a summary, "-" for a key that it lacks; and where the results are."""
    better = "" if metric.higher else ", lower is better"

    def ask(key: str, form: str = ",") -> str:
        return shown(known.get(key), form)

    def said(value: float | None) -> str:
        return NONE if value is None else in_metric(value, metric) + metric.unit + better

    def mb(key: str) -> str:
        return megabytes(known.get(key))

    dense, sent = known.get("bytes_dense_train"), _sum(known, "bytes_train_down", "bytes_train_up")
    extra = _sum(known, "bytes_discovery_down", "bytes_discovery_up")
    everything = None if sent is None or extra is None else sent + extra
    alive = f"{ask('alive')} of {ask('prunable')} prunable weights alive"
    alive += f"; {ask('density_all', '.3g')} of all {ask('parameters')} parameters"
    peers, passes = known.get("bytes_peer"), known.get("image_passes")
    tested = {CENTRAL: "central test set", LOCAL: "mean over clients"}
    tested |= {PERSONAL: "personal models"} if known.get(PERSONAL) is not None else {}
    hidden = known.get("privacy_level") == "client"
    work = (
        "not told"
        if hidden
        else NONE
        if passes is None
        else f"{ask('image_passes')} in training, {ask('validation_passes')} forward only"
    )
    late = f", {ask('late_replies')} late" if "late_replies" in known else ""
    best, ended = in_metric(known.get("best_value"), metric) + metric.unit, known.get("stopped")
    rows = [
        *([f"{metric.name}, {x}", said(known.get(k))] for k, x in tested.items()),
        *([[f"{metric.name}, best round", f"{best}, round {known['best_round']}"]] if "best_round" in known else []),
        *([["stopped", f"after round {ask('rounds')}: {ended}"]] if ended else []),
        *([["privacy", _privacy(known)]] if "privacy_level" in known else []),
        ["density", f"{ask('density', '.3g')}: {alive}"],
        ["discovery and mask", f"{mb('bytes_discovery_down')} MB down, {mb('bytes_discovery_up')} MB up"],
        ["training", f"{mb('bytes_train_down')} MB down, {mb('bytes_train_up')} MB up"],
        ["dense FedAvg, same messages", f"{megabytes(dense)} MB: {ratio(dense, sent)} x the training bytes"],
        ["dense FedAvg, discovery counted", f"{ratio(dense, everything)} x the training, discovery and mask bytes"],
        ["evaluation", f"{mb('bytes_evaluate_down')} MB down"],
        *([["the same between peers", f"{megabytes(peers)} MB without a server"]] if peers else []),
        ["image passes", work],
        ["replies", f"{ask('lost_replies')} lost, {ask('refused_replies')} refused{late}"],
        ["time", f"{ask('seconds_total', ',.1f')} s, {ask('seconds_rounds', ',.1f')} s of them in rounds"],
        *([[SIMULATED.lower(), hours(known["simulated_hours"])]] if "simulated_hours" in known else []),
    ]
    for what in ("model", "mask"):
        if known.get(f"{what}_sha256"):
            rows.append([f"SHA-256 of the {what}", str(known[f"{what}_sha256"])])
    return Table([], rows if folder is None else [*rows, ["results", str(folder)]])


def _privacy(known: Mapping[str, Any]) -> str:
    of = "a client" if known["privacy_level"] == "client" else "a record, at the site that spent most"
    noise = f", noise multiplier {known['noise_multiplier']:g}" if "noise_multiplier" in known else ""
    return f"epsilon {shown(known.get('epsilon'), '.3f')} at delta {shown(known.get('delta'), 'g')} for {of}{noise}"


def round_table(run: Run) -> Table:
    """Return one row a round."""
    rows, clock = [], has_clock(run)
    for entry, so_far, until in zip(run.rounds, cumulative_mb(run), cumulative_hours(run), strict=True):
        sizes = [str(len(entry.get(key) or ())) for key in ("cohort", "ok", "lost", "refused")]
        losses = [shown(entry.get(key), ".4f") for key in ("train_loss", "central_loss")]
        shares = [in_metric(entry.get(key), run.metric) for key in (CENTRAL, LOCAL, PERSONAL)]
        down = sum(entry.get(f"bytes_{what}_down") or 0 for what in ("train", "evaluate", "mask", "discovery"))
        up = sum(entry.get(f"bytes_{what}_up") or 0 for what in ("train", "discovery"))
        sent = [megabytes(down), megabytes(up), megabytes(so_far * MB)]
        times = [shown(entry.get("seconds"), ",.1f"), *([hours(until)] if clock else [])]
        rows.append([str(entry["round"]), *sizes, *losses, *shares, *sent, *times])
    return Table(_headers(_ROUND, run.metric) + [f"{SIMULATED} so far"] * clock, rows, texts=0)


def _sum(known: Mapping[str, Any], *keys: str) -> float | None:
    values = [known.get(key) for key in keys]
    return None if None in values else float(sum(value for value in values if value is not None))
