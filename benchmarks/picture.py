"""Draw docs/accuracy-by-bytes.png: three real runs on digits at density 0.05: python benchmarks/picture.py"""

import subprocess
import sys
import tempfile
from pathlib import Path

from ssfl_app.results.plots import accuracy_by_bytes, png_bytes
from ssfl_app.results.run_folder import read_run

ROOT = Path(__file__).parents[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        folders = []
        for strategy in ("ssfl", "random", "fedavg"):
            folders.append(Path(work) / strategy)
            words = ["run", "--engine", "inline", "-c", f"strategy='{strategy}' mask.density=0.05"]
            subprocess.run(
                [str(Path(sys.executable).parent / "ssfl"), *words, "--out", str(folders[-1])],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        picture = png_bytes(lambda: accuracy_by_bytes([read_run(folder) for folder in folders]))
    (ROOT / "docs" / "accuracy-by-bytes.png").write_bytes(picture)


if __name__ == "__main__":
    main()
