"""The mid-sagittal plane on phantoms of known pose: how far off, and how long it takes.

    python benchmarks/mid_plane.py [--cases 20] [--seed 100] [--threads 2]

The seeds are not those that the search was set up on (0 to 9). Scans have 512 x 512 pixels; some are tilted, and a
third is cut by the field of view. Seconds are with the mirror image, on the scan's own grid.
"""

import argparse
import time

import numpy as np
import torch
from monai.data import MetaTensor

from ich_pipeline.phantom.cases import make_case
from ich_pipeline.phantom.settings import PhantomSettings
from ich_pipeline.run_report import machine
from ich_pipeline.symmetry import MidPlane, MirrorChanneld


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    degrees, mm, seconds, slices = [], [], [], []
    for seed in range(given.seed, given.seed + given.cases):
        case = make_case("case", seed, PhantomSettings(cut_fraction=0.3))
        grid = case.scan.grid
        image = MetaTensor(torch.as_tensor(case.scan.image_hu, dtype=torch.float32)[None], affine=grid.affine)
        start = time.perf_counter()
        mirrored = MirrorChanneld("image")({"image": image})["image"]
        seconds.append(time.perf_counter() - start)
        slices.append(grid.shape[grid.slice_axis])
        found, true = MidPlane.of(mirrored), MidPlane(**case.truth["mid_plane"])
        assert found is not None
        degrees.append(np.degrees(np.arccos(min(1.0, abs(float(np.dot(found.normal, true.normal)))))))
        middle_mm = grid.affine[:3] @ [*((n - 1) / 2 for n in grid.shape), 1]
        mm.append(abs(float(found.distance_mm(middle_mm) - true.distance_mm(middle_mm))))
    print(f"{given.cases} phantoms from seed {given.seed}, {given.threads} threads, {machine()['cores']} cores\n")
    print("| | median | 90th percentile | worst |\n|---|--:|--:|--:|")
    for name, values in (("degrees", degrees), ("mm", mm), ("seconds", seconds), ("slices", slices)):
        print(f"| {name} | {np.median(values):.2f} | {np.percentile(values, 90):.2f} | {max(values):.2f} |")


if __name__ == "__main__":
    main()
