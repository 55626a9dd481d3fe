"""Play the study of every system on digits and record it: python benchmarks/study.py [--jobs N] [--record-only]

`ssfl compare configs/digits-study.toml` in scratch/digits-study, which goes on where it stopped; then the table, the
picture and the numbers are copied to benchmarks/results/, and the order of the methods at density 0.05 is checked.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parent / "scratch" / "digits-study"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--record-only", action="store_true", help="play nothing")
    words = parser.parse_args()
    command = [str(Path(sys.executable).parent / "ssfl"), "compare", str(HERE.parent / "configs/digits-study.toml")]
    command += ["--out", str(OUT), "--jobs", str(words.jobs), *(["--report-only"] if words.record_only else [])]
    subprocess.run(command, check=not words.record_only)
    for kind in ("md", "png", "json"):
        shutil.copy(OUT / f"comparison.{kind}", HERE / "results" / f"digits-study.{kind}")
    text = (HERE / "results" / "digits-study.md").read_text()
    (HERE / "results" / "digits-study.md").write_text(text.replace("(comparison.png)", "(digits-study.png)"))
    print(json.dumps(list(json.loads((OUT / "comparison.json").read_text())))[:200])


if __name__ == "__main__":
    main()
