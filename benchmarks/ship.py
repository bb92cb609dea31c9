"""Put the weights of a trained and calibrated bundle into the one that ships.

    ich-pipeline train bundle=cascade3d variant=synthesis preset=shipped_cpu out=runs/cascade3d [background=HEAD]
    ich-pipeline phantom runs/phantoms --cases 150 --seed 90002 --matrix 256 --split val --varied
    ich-pipeline calibrate bundle=runs/cascade3d/bundle data=runs/phantoms/manifest.csv split=val out=runs/calibration
    python benchmarks/ship.py runs/cascade3d/bundle runs/calibration

Weights are stored in half precision, their SHA-256, the operating points and the calibration go into the metadata, and
temperature, threshold, least peak and smallest lesion into the configs, whose other keys must be those of the run; the
reliability plot goes beside the model card.
"""

import argparse
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

import torch

from ich_pipeline.bundles import Bundle, find_bundle, read_yaml
from ich_pipeline.calibration import PLOT_FILE
from ich_pipeline.errors import ConfigError
from ich_pipeline.files import atomic_path, sha256_of, write_json
from ich_pipeline.settings import DEFAULT_BUNDLE

LARGEST_BYTES = 25_000_000
CHOSEN = ("temperature", "threshold", "min_lesion_peak", "min_lesion_ml")
COPIED = ("trained_on_phantoms", "trained_slice_mm", "operating_points", "calibration")
SAME = ("filters", "spacing_mm", "window_hu", "coarse_scale", "resize", "margin", "coarse_threshold")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a trained and calibrated bundle")
    parser.add_argument("calibration", type=Path, help="folder that its calibration wrote")
    parser.add_argument("--recipe", default="preset=shipped_cpu", help="what the metadata say of it")
    given = parser.parse_args()
    source, target = Bundle(given.run.resolve()), find_bundle(DEFAULT_BUNDLE)
    plot = given.calibration / PLOT_FILE
    if not plot.is_file():
        raise ConfigError(f"{plot} is not there: expected the folder that `ich-pipeline calibrate` wrote, its out=.")
    if source.weights is None or "calibration" not in source.metadata:
        raise ConfigError(f"{source.path}: expected a trained bundle that `ich-pipeline calibrate` has seen.")
    run, own = source.config("inference"), target.config("inference")
    different = [key for key in SAME if run[key] != own[key]]
    if different:
        key = different[0]
        raise ConfigError(f"{key} is {run[key]} in {source.path} and {own[key]} in {target.path}: make them the same.")
    state = torch.load(source.weights, map_location="cpu", weights_only=True)
    # MONAI's DynUNet has each layer under two names: one tensor, which is to be stored once.
    made: dict[int, torch.Tensor] = {}
    half = {
        name: made.setdefault(value.data_ptr(), value.half()) if value.is_floating_point() else value
        for name, value in state.items()
    }
    if not all(torch.isfinite(value).all() for value in half.values()):
        raise ConfigError(f"{source.weights}: a number is too large for half precision.")
    weights = target.path / "models" / "model.pt"
    with atomic_path(weights) as temporary, temporary.open("wb") as stream:
        torch.save(half, stream)
    if weights.stat().st_size > LARGEST_BYTES:
        raise ConfigError(f"{weights} has {weights.stat().st_size} bytes, expected at most {LARGEST_BYTES}.")
    for file in (target.path / "configs" / f"{name}.yaml" for name in ("inference", "train")):
        text = file.read_text()
        for key in CHOSEN:
            text = re.sub(rf"^{key}: .*$", f"{key}: {run[key]}", text, flags=re.MULTILINE)
        read_yaml(file)
        with atomic_path(file) as temporary:
            temporary.write_text(text)
    copied = {key: source.metadata[key] for key in COPIED}
    sha256 = sha256_of(weights)
    trained = {"weights_sha256": sha256, "trained": f"variant=synthesis {given.recipe}, {datetime.now(UTC):%Y-%m-%d}"}
    # The same weights with another operating point were not trained today.
    new = trained if sha256 != target.metadata["weights_sha256"] else {}
    write_json(target.path / "configs" / "metadata.json", target.metadata | copied | new)
    shutil.copyfile(plot, target.path / "docs" / PLOT_FILE)
    print(f"{weights}: {weights.stat().st_size / 1e6:.1f} MB, {sha256}")


if __name__ == "__main__":
    main()
