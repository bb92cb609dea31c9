"""Whether a long batch grows: resident memory after every hundred scans, with `hu_threshold` and everything written.

    python benchmarks/endurance.py [--cases 500] [--bundle DIR]

The scans are one phantom, with larger pixels, under many names. A batch keeps its rows, and their lesions are many in a
noisy mask: that much is counted apart. Prints a table; exits 1 when the rest grew by more than a megabyte a hundred
scans after the first two hundred, in which caches and the allocator fill up.
"""

import argparse
import os
import pickle
import sys
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
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


def smaller(image: Path, out: Path) -> Path:
    """Every 4 x 4 pixels averaged, so that a scan takes a fraction of a second."""
    whole = nib.load(image)
    values = np.asarray(whole.dataobj, dtype=np.float32)
    i, j, k = values.shape
    pixels = values[: i // 4 * 4, : j // 4 * 4].reshape(i // 4, 4, j // 4, 4, k).mean(axis=(1, 3))
    affine = whole.affine @ np.diag([4.0, 4.0, 1.0, 1.0])
    nib.save(nib.Nifti1Image(np.rint(pixels).astype(np.int16), affine), out)
    return out


def mib_of(rows: Sequence[CaseRow]) -> float:
    """What rows take in memory: a copy of them is made and counted."""
    packed = pickle.dumps(rows)
    tracemalloc.start()
    copies = pickle.loads(packed)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(copies) == len(rows)
    return held / 2**20


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
        (image,) = (folder / "phantom" / "images").iterdir()
        scan = smaller(image, folder / "smaller.nii.gz")
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
        rows = run_batch(cases, pipeline, folder / "volumes.csv", on_row=told)
    print(file=sys.stderr)
    row_mib = mib_of(rows[:EVERY]) / min(EVERY, len(rows))
    # What three overlapping cases take moves from row to row: the least of ten rows is what stays.
    ends = range(EVERY, len(resident_mib) + 1, EVERY)
    held = [min(resident_mib[end - 10 : end]) for end in ends]
    rest = [mib - end * row_mib for end, mib in zip(ends, held, strict=True)]
    print(f"{os.cpu_count()} cores, bundle {bundle.name}\n\n| scans | resident MiB | without the rows |\n|--:|--:|--:|")
    print("\n".join(f"| {end} | {mib:.0f} | {less:.0f} |" for end, mib, less in zip(ends, held, rest, strict=True)))
    settled = rest[1:]
    if len(settled) > 1:
        growth = float(np.polyfit(range(len(settled)), settled, 1)[0])
        lesions = np.mean([len(row.report.lesions) for row in rows if row.report])
        print(
            f"\n{growth:+.2f} MiB a hundred scans beside the rows ({row_mib * 1024:.0f} KiB of {lesions:.0f} lesions)."
        )
        sys.exit(int(growth > LIMIT_MIB))


if __name__ == "__main__":
    main()
