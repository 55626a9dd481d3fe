"""SSFL when classes join late: python benchmarks/shift.py

Digits, 20 clients; the last 4 hold classes 8 and 9 and nobody else does; they join at round 11 of 30. Density 0.05,
where a mask that never saw these classes should hurt most. Compared: no refresh; one that is scheduled for round 12;
one that the server triggers by the newcomers' loss; training from scratch under the new mask; dense FedAvg. Recorded
in benchmarks/results/shift.{json,md}: accuracy of the early and of the late clients on their own test images, three
rounds after the late ones joined and at the end, the bytes of the refresh, and how far the masks are apart.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
JOIN, LATE, SEEDS = 11, range(16, 20), (1, 2, 3)
COMMON = f"run.rounds=30 mask.density=0.05 local.epochs=2 shift.round={JOIN} shift.clients=4 shift.classes=2"
SCHEDULED = f"ssfl.refresh='scheduled' ssfl.refresh-round={JOIN + 1}"
VARIANTS = {
    "ssfl, no refresh": "",
    "ssfl, refresh scheduled": SCHEDULED,
    "ssfl, refresh by drift": "ssfl.refresh='drift'",
    "ssfl, refresh, weights back at 0": f"{SCHEDULED} ssfl.refresh-weights='zero'",
    "ssfl, restart": f"{SCHEDULED} ssfl.refresh-weights='restart'",
    "fedavg (dense)": "strategy='fedavg'",
}


def play(keys: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        ssfl = str(Path(sys.executable).parent / "ssfl")
        subprocess.run([ssfl, "run", "--engine", "inline", "-c", keys, "--out", str(out)], check=True)
        rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
        summary, where = (json.loads((out / f"{n}.json").read_text()) for n in ("summary", "environment"))
    asked = [r for r in rounds if "setup_asked" in r]
    return {
        "accuracy": [groups(r["local_accuracy"]) for r in rounds[1:]],
        "central": [r["central_accuracy"] for r in rounds[1:]],
        "refreshed": [r["round"] for r in asked],
        "mask_distance": [r["mask_distance"] for r in asked],
        "refresh_bytes": sum(r["bytes_discovery_down"] + r["bytes_discovery_up"] for r in asked),
        "train_bytes": summary["bytes_train_down"] + summary["bytes_train_up"],
        "environment": where,
    }


def groups(accuracy: dict[str, float]) -> dict[str, float]:
    late = [a for client, a in accuracy.items() if int(client) in LATE]
    early = [a for client, a in accuracy.items() if int(client) not in LATE]
    return {"early": statistics.mean(early), "late": statistics.mean(late)}


def row(name: str, runs: list[dict]) -> str:
    def at(round_: int, group: str) -> str:
        values = [100 * run["accuracy"][round_ - 1][group] for run in runs]
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"

    when = ", ".join(sorted({str(r) for run in runs for r in run["refreshed"]}, key=int)) or "-"
    far = [d for run in runs for d in run["mask_distance"]]
    return " | ".join(
        [
            f"| {name}",
            when,
            at(JOIN + 3, "late"),
            at(30, "late"),
            at(JOIN + 3, "early"),
            at(30, "early"),
            f"{100 * statistics.mean(run['central'][-1] for run in runs):.1f}",
            f"{statistics.mean(far):.2f}" if far else "-",
            f"{statistics.mean(run['refresh_bytes'] for run in runs) / 1e6:.1f}",
            f"{statistics.mean(run['train_bytes'] for run in runs) / 1e6:.1f} |",
        ]
    )


def main() -> None:
    record = HERE / "results" / "shift.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    lines = []
    for name, keys in VARIANTS.items():
        for seed in SEEDS:
            words = f"{COMMON} {keys} run.seed={seed}"
            if words not in known:
                known[words] = play(words)
                record.write_text(json.dumps(known, indent=1) + "\n")
        lines.append(row(name, [known[f"{COMMON} {keys} run.seed={seed}"] for seed in SEEDS]))
        print(lines[-1], flush=True)
    where = next(iter(known.values()))["environment"]
    head = (
        f"| variant | refreshed before round | late clients % after round {JOIN + 3} | at the end | early clients % "
        f"after round {JOIN + 3} | at the end | central % | Jaccard distance of the masks | MB of the refresh | "
        "MB of training |"
        "\n" + "|---" * 10 + "|"
    )
    title = f"Digits, {COMMON}; mean ± standard deviation of {len(SEEDS)} seeds; "
    title += f"{where['cores']} cores of {where['cpu']}, no GPU, {date.today()}, torch {where['torch']}"
    (HERE / "results" / "shift.md").write_text("\n".join([title, "", head, *lines, ""]))


if __name__ == "__main__":
    main()
