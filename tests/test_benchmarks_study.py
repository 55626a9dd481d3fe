"""The record of the digits study: the short table, what still waits, and where the paper's order does not hold."""

import json
from pathlib import Path
from typing import Any

from benchmarks.study import check_order, pack, record, short_is_whole, short_table, unpack, waits

SEEDS = {"1": 0.9, "2": 0.8}


def row(
    name: str, own: float, density: float | None = 0.05, *, missing: dict[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    """Return a row as comparison.json has it."""
    means = {
        "density": density or 1.0,
        "central": own - 0.1,
        "own": own,
        "down": 2e6,
        "up": 1e6,
        "image_passes": 1234.0,
    }
    known: dict[str, Any] = {key: {"mean": mean, "half_width_95": 0.01, "seeds": 2} for key, mean in means.items()}
    base = {
        "row": name,
        "mask_density": density,
        "means": known | {"personal": None},
        "settings": {},
        "missing": missing or {},
    }
    return base | {"difference": None, "seeds": SEEDS} | more


def table(terms: str, *rows: dict[str, Any]) -> dict[str, Any]:
    return {"axes": {"partition.name": "dirichlet"}, "terms": terms, "rows": list(rows)}


def test_the_short_table_has_common_and_own_settings_side_by_side(tmp_path: Path) -> None:
    gap = {"p_holm": 0.03}
    lost = row("topk", 0.5, missing={"1": "not played", "2": "not played"}, means={}, seeds={})
    common = table(
        "common settings", row("fedavg", 0.95, None), row("random", 0.7, difference=gap), row("ssfl", 0.8), lost
    )
    common["rows"].append(row("ssfl", 0.99, 0.1))  # another density
    chosen = row("random", 0.85, settings={"local.lr": 0.3}, difference={"p_holm": 0.001})
    own = table("own settings", chosen, row("ssfl", 0.9, missing={"2": "failed: x"}))
    (tmp_path / "comparison.json").write_text(json.dumps({"tables": [common, own]}))
    (tmp_path / "comparison.md").write_text("![Accuracy](comparison.png)")
    (tmp_path / "comparison.png").write_bytes(b"")
    (tmp_path / "results").mkdir()
    assert record(tmp_path, "digits-study", tmp_path / "results") == [common, own]
    assert (tmp_path / "results" / "digits-study.md").read_text() == "![Accuracy](digits-study.png)"
    brief = (tmp_path / "results" / "digits-study-brief.md").read_text("utf-8").splitlines()
    assert brief[2:] == [
        "| `fedavg` | 1 | 85.0 ± 1.0 | 95.0 ± 1.0 | – | 3.0 |",  # noqa: RUF001
        "| `ssfl` | 0.05 | 70.0 ± 1.0 | 80.0 ± 1.0 | – | 3.0 |",  # noqa: RUF001
        "| `random` | 0.05 | 60.0 ± 1.0 | 70.0 ± 1.0 | 0.03 | 3.0 |",
    ]
    lines = (tmp_path / "results" / "digits-study-short.md").read_text("utf-8").splitlines()
    assert lines[0] == "Dirichlet:"
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]] == [
        ["`ssfl`", "0.05", "70.0 ± 1.0", "80.0 ± 1.0", "global", "–", "90.0 ± 1.0", "–", "", "3.0", "1,234"],  # noqa: RUF001
        [
            "`random`",
            "0.05",
            "60.0 ± 1.0",
            "70.0 ± 1.0",
            "global",
            "0.03",
            "85.0 ± 1.0",
            "<0.01",
            "local.lr 0.3",
            "3.0",
            "1,234",
        ],
        ["`fedavg`", "1", "85.0 ± 1.0", "95.0 ± 1.0", "global", "–", "–", "–", "–", "3.0", "1,234"],  # noqa: RUF001
    ]
    assert "`ssfl` (2 of 3 seeds)" in short_table(table("", row("ssfl", 0.9, missing={"3": "failed: x"})), {})


def test_what_failed_waits_no_longer() -> None:
    whole, failed = row("ssfl", 0.9), row("random", 0.8, missing={"3": "failed: loss is NaN"})
    assert not waits([table("", whole, failed)])
    for why in ("not played", "unfinished", "not tuned yet: 2 tuning runs are not played"):
        assert waits([table("", whole, row("random", 0.8, missing={"3": why}))])
        assert not short_is_whole([table("", whole, row("random", 0.8, missing={"3": why}))])
        others = row("random", 0.8, 0.5, missing={"3": why}), row("random", 0.8, missing={"3": why})
        assert short_is_whole([table("", whole, others[0]), table("own settings", others[1])])


def test_finished_runs_are_found_on_another_machine(tmp_path: Path) -> None:
    here, archive, there = tmp_path / "here", tmp_path / "runs.tar.xz", tmp_path / "there"
    for name, status in (("a", "finished"), ("b", "running")):
        (here / name).mkdir(parents=True)
        (here / name / "status.json").write_text(json.dumps({"status": status}))
        (here / name / "rounds.jsonl").write_text('{"round": 1}\n')
        (here / name / "model.safetensors").write_bytes(b"large")
    unpack(archive, there)  # the first time there is none
    pack(here, archive)
    first = archive.read_bytes()
    pack(here, archive)
    assert archive.read_bytes() == first
    (there / "c").mkdir(parents=True)
    unpack(archive, there)
    assert sorted(str(path.relative_to(there)) for path in there.rglob("*")) == [
        "a",
        "a/rounds.jsonl",
        "a/status.json",
        "c",
    ]
    (there / "a" / "rounds.jsonl").write_text("goes on")
    unpack(archive, there)
    assert (there / "a" / "rounds.jsonl").read_text() == "goes on"


def test_what_contradicts_the_paper_is_named_with_its_size() -> None:
    found = check_order(
        table("", row("ssfl", 0.9), row("random", 0.925), row("shuffled", 0.93), row("ssfl", 0.1, 0.5))
    )
    said = ["random is 2.5 points above ssfl", "shuffled is 3.0 points above ssfl"]
    assert found == [f"{metric}: {line}" for metric in ("central", "own") for line in said]
