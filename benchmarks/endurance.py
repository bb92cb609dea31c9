"""Whether a long batch grows: resident memory after every hundred scans, with `hu_threshold` and everything written.

    python benchmarks/endurance.py [--cases 500] [--bundle DIR]

The scans are one phantom under many names. Prints a table; exits 1 when memory after the first hundred grew by more
than a megabyte a hundred scans.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil

from ich_pipeline.batch import run_batch
from ich_pipeline.bundles import find_bundle, resolve
from ich_pipeline.inference import Segmenter
from ich_pipeline.phantom import write_dataset
from ich_pipeline.pipeline import Pipeline
from ich_pipeline.records import CaseRecord
from ich_pipeline.report import CaseRow
from ich_pipeline.run_report import RunReport

EVERY = 100
LIMIT_MIB = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--bundle", default="hu_threshold")
    given = parser.parse_args()
    bundle = find_bundle(given.bundle)
    segmenter = Segmenter(bundle, resolve(bundle, ["inference"], {}, None)["inference"])
    process, resident_mib = psutil.Process(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "phantom", 1, 0)
        (scan,) = (folder / "phantom" / "images").iterdir()
        cases = []
        for n in range(given.cases):
            (folder / f"case{n:04}.nii.gz").hardlink_to(scan)
            cases.append(CaseRecord(f"case{n:04}", folder / f"case{n:04}.nii.gz"))

        def told(row: CaseRow) -> None:
            assert row.status == "ok", row.error
            resident_mib.append(process.memory_info().rss / 2**20)
            print(f"\r{len(resident_mib)} of {given.cases}", end="", file=sys.stderr)

        report = RunReport({}, command=["endurance"])
        pipeline = Pipeline(segmenter, folder / "masks", folder / "pictures", report)
        run_batch(cases, pipeline, folder / "volumes.csv", on_row=told)
    print(file=sys.stderr)
    # What three overlapping cases take moves from row to row: the least of ten rows is what stays.
    ends = range(EVERY, len(resident_mib) + 1, EVERY)
    held = [min(resident_mib[end - 10 : end]) for end in ends]
    print(f"{os.cpu_count()} cores, bundle {bundle.name}\n\n| scans | resident MiB |\n|--:|--:|")
    print("\n".join(f"| {end} | {mib:.0f} |" for end, mib in zip(ends, held, strict=True)))
    if len(held) > 1:
        growth = float(np.polyfit(range(len(held)), held, 1)[0])
        print(f"\n{growth:+.2f} MiB a hundred scans.")
        sys.exit(int(growth > LIMIT_MIB))


if __name__ == "__main__":
    main()
