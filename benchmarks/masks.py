"""Record the mask studies on digits: python benchmarks/masks.py

`ssfl study masks` for 100 clients at densities 0.5 and 0.05, and `ssfl study clients` on two runs whose clients
differ in size (dirichlet-class): pictures and numbers go to benchmarks/results/.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FEDERATION = "run.clients=100 run.cohort=10 partition.alpha=1.0 ssfl.saliency-batch-size=16"
UNEQUAL = "partition.name='dirichlet-class' partition.alpha=1.0 run.evaluate-every=20"


def ssfl(*words: str) -> None:
    subprocess.run([str(Path(sys.executable).parent / "ssfl"), *words], check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for density in (0.5, 0.05):
            out = folder / f"masks-{density}"
            ssfl("study", "masks", "-c", f"{FEDERATION} mask.density={density}", "--out", str(out))
            for kind in ("png", "json"):
                shutil.copy(out / f"mask-error.{kind}", RESULTS / f"mask-error-{density}.{kind}")
        runs = [str(folder / f"{strategy}-0.05") for strategy in ("ssfl", "random")]
        for run in runs:
            strategy = Path(run).name.partition("-")[0]
            keys = f"{UNEQUAL} strategy='{strategy}' mask.density=0.05"
            ssfl("run", "--engine", "inline", "-c", keys, "--out", run)
        ssfl("study", "clients", *runs, "--out", str(folder / "clients"))
        for kind in ("png", "json"):
            shutil.copy(folder / "clients" / f"client-accuracy.{kind}", RESULTS / f"client-accuracy.{kind}")


if __name__ == "__main__":
    main()
