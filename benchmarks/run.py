"""What a head CT costs: seconds by stage, against nnU-Net's own predictor, fast against full, memory, engines.

    python benchmarks/run.py [study nnunet agreement memory engines] [--bundle DIR] [--demo DIR] [--out FOLDER]
    python benchmarks/run.py bundles --bundles DIR DIR ...     the study by any trained bundles, with engine=torch

Writes OUT/speed.json and OUT/speed.md. Only ratios within one run mean something on another machine. A network of the
published size has not been trained here: its weights are random, it does all its work, and then stage two's regions
and the mask are those of the study's label (`LabelledCascade`). The same holds for the preset without --bundle.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser

from ich_pipeline import bundles
from ich_pipeline.bundles import Bundle
from ich_pipeline.cascade import CascadeInferer
from ich_pipeline.evaluation import labelled_cases
from ich_pipeline.files import sha256_of, write_json
from ich_pipeline.geometry import Grid
from ich_pipeline.inference import Segmenter
from ich_pipeline.overlap import compare_masks
from ich_pipeline.phantom import PhantomSettings, make_case
from ich_pipeline.pipeline import Pipeline
from ich_pipeline.reading import read_mask
from ich_pipeline.records import CaseRecord, NiftiForms
from ich_pipeline.restoring import write_mask
from ich_pipeline.run_report import RunReport, machine, peak_rss_mib, versions
from ich_pipeline.transforms import ModelGridd, ReadMaskd

SIZES = {"preset=cpu": "cpu", "published": None}  # name in the tables: preset of cascade3d
ENGINES = ("openvino", "torch")
SPACING_MM, SHAPE = (0.49, 0.49, 5.0), (512, 512, 28)
THIN_SLICES, THIN_MM = 400, 0.4
Results = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """The scan that is measured with, its label, and where things may be written."""

    case: CaseRecord
    folder: Path
    repeats: int
    trained: Path | None
    sizes: tuple[str, ...] = tuple(SIZES)


class LabelledCascade(CascadeInferer):
    """Both stages at work; then stage one's regions and the answer are those of a label on the model grid."""

    label: torch.Tensor

    def coarse_probability(self, image: torch.Tensor, network: Any) -> torch.Tensor:
        """Stage one's work, the label's answer."""
        found = super().coarse_probability(image, network)
        padding = [p for n, m in zip(self.label.shape[:-4:-1], image.shape[:-4:-1], strict=True) for p in (0, m - n)]
        return torch.nn.functional.pad(self.label, padding).to(found)

    def __call__(self, inputs: torch.Tensor, network: Any, *args: object, **kwargs: object) -> torch.Tensor:
        """Stage two's work, the label's answer."""
        return super().__call__(inputs, network) * 0 + self.label


def summary(seconds: list[float]) -> Results:
    return {"median": median(seconds), "min": min(seconds), "max": max(seconds), "n": len(seconds)}


def timed(work: Callable[[], Any], repeats: int) -> Results:
    """Seconds of `repeats` calls after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return summary(seconds[1:])


def write_nifti(path: Path, values: np.ndarray, grid: Grid) -> Path:
    import nibabel as nib

    image = nib.Nifti1Image(values, grid.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(grid.affine, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def make_study(folder: Path, repeats: int, trained: Path | None, sizes: tuple[str, ...]) -> Study:
    """A phantom of 512 x 512 pixels of 0.49 mm and 28 slices of 5 mm, its bleeds in the middle of them."""
    settings = PhantomSettings(
        clean_fraction=0,
        subtype_weights={"IPH": 1.0},
        kinds_probability=(1.0,),
        volume_ml=(20.0, 40.0),
        pixel_mm=(SPACING_MM[0],) * 2,
        slice_mm=(SPACING_MM[2],),
        tilt_fraction=0,
        cut_fraction=0,
        circle_fraction=0,
    )
    made = make_case("study", 0, settings)
    middle = int(np.flatnonzero(made.label.any(axis=(0, 1))).mean())
    start = min(max(0, middle - SHAPE[2] // 2), made.label.shape[2] - SHAPE[2])
    held = slice(start, start + SHAPE[2])
    affine = made.scan.grid.affine.copy()
    affine[:3, 3] += start * affine[:3, 2]
    grid = Grid(SHAPE, affine)
    image = write_nifti(folder / "scan" / "study.nii.gz", made.scan.image_hu[..., held], grid)
    write_mask(folder / "label.nii.gz", (made.label[..., held] > 0).astype(np.uint8), grid, NiftiForms(affine, 1))
    return Study(CaseRecord("study", image, folder / "label.nii.gz"), folder, repeats, trained, sizes)


def untrained(folder: Path, preset: str | None) -> Path:
    """cascade3d with random weights of a preset's size."""
    out = folder / f"untrained_{preset}"
    if not out.exists():
        source = bundles.find_bundle("cascade3d")
        configs = bundles.resolve(source, ["inference", "metadata"], {}, preset)
        shutil.copytree(source.path, out)
        torch.manual_seed(0)
        network = ConfigParser(configs["inference"]).get_parsed_content("network_def")
        weights = out / "models" / "model.pt"
        weights.parent.mkdir(exist_ok=True)
        torch.save(network.state_dict(), weights)
        configs["metadata"]["weights_sha256"] = sha256_of(weights)
        bundles.write_configs(out, configs)
    return out


def segmenter_for(study: Study, size: str, **overrides: Any) -> Segmenter:
    """A bundle of one size made ready; answers as the label where it is not trained."""
    preset = SIZES[size]
    path = study.trained if preset and study.trained else untrained(study.folder, preset)
    bundle = Bundle(path.resolve())
    config = bundles.resolve(bundle, ["inference"], {"device": "cpu", **overrides}, None)["inference"]
    segmenter = Segmenter(bundle, config)
    if path != study.trained:
        keys = ("roi_size", "overlap", "blending", "mode", "coarse_threshold")
        labelled = LabelledCascade(**{key: config[key] for key in keys})
        data = segmenter.reading({"image": str(study.case.image)}) | ReadMaskd("label")(
            {"label": str(study.case.label)}
        )
        on_grid = ModelGridd(["image", "label"], config["spacing_mm"])(data)["label"]
        labelled.label = on_grid.as_tensor()[None]
        segmenter.inferer.inferer = labelled
    return segmenter


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock, and of processor time, which leaves out waiting for other programs."""

    wall: float
    cpu: float


def cost(work: Callable[[], Any]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def run_case(study: Study, segmenter: Segmenter) -> tuple[Cost, Results]:
    """One case through the pipeline: its cost, and wall-clock seconds by stage."""
    report = RunReport({})
    pipeline = Pipeline(segmenter, study.folder / "masks", study.folder / "pictures", report)
    spent = cost(lambda: pipeline.run(study.case))
    report.add_case("study", "ok")
    report.write(study.folder / "run.json")
    return spent, json.loads((study.folder / "run.json").read_text())["cases"][0]["seconds"]


def measure_study(study: Study, segmenter: Segmenter, repeats: int) -> Results:
    """Seconds from file to mask, row and picture; the first call, which converts and compiles, is told apart."""
    first, _ = run_case(study, segmenter)
    network = median(network_cpu(study, segmenter) for _ in range(repeats))
    runs = [run_case(study, segmenter) for _ in range(repeats)]
    stages = {name: median(stage[name] for _, stage in runs) for name in runs[0][1]}
    cpu = median(spent.cpu for spent, _ in runs)
    return {
        "wall": summary([spent.wall for spent, _ in runs]),
        "cpu": summary([spent.cpu for spent, _ in runs]),
        "stages": stages,
        "outside_share": (sum(stages.values()) - stages["network"]) / stages["network"],
        "outside_share_cpu": (cpu - network) / network,
        "first": first.wall,
        "in_use": segmenter.engine,
    }


def network_cpu(study: Study, segmenter: Segmenter) -> float:
    """Processor seconds of the network alone."""
    loaded = segmenter.read(study.case)
    image = loaded.data["image"][None]
    return cost(lambda: segmenter.inferer(image, segmenter.network)).cpu


def part_study(study: Study) -> Results:
    results: Results = {}
    for size in study.sizes:
        name = size if study.trained and SIZES[size] else f"{size}, untrained"
        made = {engine: segmenter_for(study, size, engine=engine) for engine in ENGINES}
        results[name] = {engine: measure_study(study, each, study.repeats) for engine, each in made.items()}
    return results


def part_bundles(study: Study, folders: list[Path]) -> Results:
    """The study by trained bundles, whatever their networks."""
    results: Results = {}
    # Trainings of one architecture have one name, and often folders of one name: below what they share, paths differ.
    shared = os.path.commonpath([folder.resolve().parent for folder in folders])
    for folder in folders:
        bundle = Bundle(folder.resolve())
        config = bundles.resolve(bundle, ["inference"], {"device": "cpu", "engine": "torch"}, None)["inference"]
        results[f"{bundle.name}, {bundle.path.relative_to(shared)}"] = {
            "torch": measure_study(study, Segmenter(bundle, config), study.repeats)
        }
    return results


def nnunet_predictor(features: list[int]) -> Any:
    """nnU-Net v2's predictor with the plan it makes for such data: patch 16 x 320 x 320, flat kernels first."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    strides = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]]
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 6,
            "features_per_stage": features,
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[1, 3, 3]] * 2 + [[3, 3, 3]] * 4,
            "strides": strides,
            "conv_bias": True,
            "n_conv_per_stage": [2] * 6,
            "n_conv_per_stage_decoder": [2] * 5,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    resampling = {"order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "batch_dice": True,
        "patch_size": [16, 320, 320],
        "spacing": list(SPACING_MM[::-1]),
        "architecture": architecture,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        **{f"resampling_fn_{k}": "resample_data_or_seg_to_shape" for k in ("data", "seg", "probabilities")},
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **resampling},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **resampling},
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **resampling},
    }
    intensities = {"mean": 35.0, "std": 15.0, "percentile_00_5": -5.0, "percentile_99_5": 85.0}
    plans = PlansManager(
        {
            "dataset_name": "bench",
            "plans_name": "bench",
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "label_manager": "LabelManager",
            "configurations": {"3d_fullres": configuration},
            "experiment_planner_used": "ExperimentPlanner",
            "foreground_intensity_properties_per_channel": {"0": intensities},
        }
    )
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "hemorrhage": 1}, "file_ending": ".nii.gz"}
    plan = plans.get_configuration("3d_fullres")
    network = get_network_from_plans(
        plan.network_arch_class_name,
        plan.network_arch_init_kwargs,
        plan.network_arch_init_kwargs_req_import,
        1,
        2,
        allow_init=True,
        deep_supervision=False,
    )
    predictor = nnUNetPredictor(tile_step_size=0.5, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(network, plans, plan, [network.state_dict()], dataset, "nnUNetTrainer", None)
    return predictor


def part_nnunet(study: Study) -> Results:
    """Array to segmentation by nnU-Net (preprocessing, sliding window, resampling; no files), file to file by us.

    Ours is measured before and after nnU-Net's one pass, because the machine may be busy with something else.
    """
    import nibabel as nib

    image = np.asarray(nib.load(study.case.image).dataobj, np.float32).transpose(2, 1, 0)[None]
    properties = {"spacing": list(SPACING_MM[::-1])}
    results = {}
    for size in study.sizes:
        predictor = nnunet_predictor([8, 16, 32, 64, 64, 64] if SIZES[size] else [32, 64, 128, 256, 320, 320])
        segmenter = segmenter_for(study, size, engine="openvino")
        run_case(study, segmenter)
        ours = [run_case(study, segmenter)[0] for _ in range(study.repeats)]
        theirs = cost(lambda: predictor.predict_single_npy_array(image, properties))  # noqa: B023
        ours += [run_case(study, segmenter)[0] for _ in range(study.repeats)]
        results[size] = {
            "ours": summary([spent.wall for spent in ours]),
            "nnunet": theirs.wall,
            "ratio": theirs.wall / median(spent.wall for spent in ours),
            "ratio_cpu": theirs.cpu / median(spent.cpu for spent in ours),
        }
    return results


def part_agreement(demo: Path) -> Results:
    """Masks of mode=fast against mode=full, and of both against the label, over a demo's test cases."""
    bundle = bundles.find_bundle(str(demo / "run" / "bundle"))
    masks, seconds = {}, {}
    cases = labelled_cases(demo / "phantoms" / "manifest.csv", "test")
    for mode in ("fast", "full"):
        config = bundles.resolve(bundle, ["inference"], {"engine": "openvino", "mode": mode, "device": "cpu"}, None)
        segmenter = Segmenter(bundle, config["inference"])
        start = time.perf_counter()
        masks[mode] = [segmenter.segment(segmenter.read(case)).mask for case in cases]
        seconds[mode] = time.perf_counter() - start
    rows = []
    for case, fast, full in zip(cases, masks["fast"], masks["full"], strict=True):
        label, _ = read_mask(case.label, case.case_id)
        both, of_fast, of_full = (
            compare_masks(case.case_id, a, b) for a, b in ((fast, full), (fast, label), (full, label))
        )
        rows.append(
            {
                "case": case.case_id,
                "label_ml": of_fast.label_ml,
                "fast_ml": of_fast.pred_ml,
                "full_ml": of_full.pred_ml,
                "fast_full": both.dice,
                "fast_label": of_fast.dice,
                "full_label": of_full.dice,
            }
        )
    bleeding = [row for row in rows if row["label_ml"]]
    means = {
        key: {
            name: float(np.mean([row[key] for row in group])) for name, group in (("all", rows), ("bleeding", bleeding))
        }
        for key in ("fast_full", "fast_label", "full_label")
    }
    return {"cases": rows, "n": len(rows), "n_bleeding": len(bleeding), "means": means, "seconds": seconds}


def part_memory(study: Study) -> Results:
    """Peak resident memory of a process that segments one 512 x 512 x 400 scan."""
    from scipy.ndimage import zoom

    thin = study.folder / "thin"
    mask, _ = read_mask(study.case.label)
    affine = mask.grid.affine @ np.diag([1, 1, THIN_MM / SPACING_MM[2], 1])
    grid = Grid((*SHAPE[:2], THIN_SLICES), affine)
    import nibabel as nib

    stretch = (1, 1, THIN_SLICES / SHAPE[2])
    image_hu = zoom(np.asarray(nib.load(study.case.image).dataobj), stretch, order=1)
    write_nifti(thin / "scan" / "study.nii.gz", image_hu, grid)
    label = zoom(mask.values, stretch, order=0)
    write_mask(thin / "label.nii.gz", label, grid, NiftiForms(affine, 1))
    results: Results = {}
    for size in study.sizes:
        for engine in ENGINES:
            words = [sys.executable, __file__, "one", "--folder", str(thin), "--size", size, "--engine", engine]
            trained = ["--bundle", str(study.trained)] if study.trained else []
            done = subprocess.run([*words, *trained], capture_output=True, text=True, check=True)
            results.setdefault(size, {})[engine] = json.loads(done.stdout.splitlines()[-1])
    return results


def part_one(folder: Path, trained: Path | None, size: str, engine: str) -> None:
    """The process that `memory` looks at."""
    study = Study(CaseRecord("study", folder / "scan" / "study.nii.gz", folder / "label.nii.gz"), folder, 1, trained)
    segmenter = segmenter_for(study, size, engine=engine)
    before = peak_rss_mib()
    spent, _ = run_case(study, segmenter)
    print(json.dumps({"before_gib": before / 1024, "peak_gib": peak_rss_mib() / 1024, "seconds": spent.wall}))


def part_engines(study: Study) -> Results:
    """One stage on the head box: engine, precision, shapes, threads, and what conversion and compilation cost."""
    import openvino as ov

    from ich_pipeline.engines import OpenVINOStage, autocast, openvino_core

    core = openvino_core()
    results: Results = {}
    for size in study.sizes:
        segmenter = segmenter_for(study, size)
        stage = segmenter.network.fine_stage
        image = segmenter.read(study.case).data["image"].as_tensor()[None]
        divisible = segmenter.network.divisible
        image = image[(..., *[slice(n - n % d) for n, d in zip(image.shape[2:], divisible, strict=True)])].contiguous()
        rows: Results = {"window": list(image.shape[2:])}
        for amp in ("off", "on"):
            with torch.inference_mode(), autocast(torch.device("cpu"), amp):
                rows[f"torch {'bf16' if amp == 'on' else 'f32'}"] = timed(lambda: stage(image), study.repeats)  # noqa: B023
        for amp in ("off", "auto"):
            converted = OpenVINOStage(stage, amp)
            start = time.perf_counter()
            converted(image)
            first = time.perf_counter() - start
            rows[f"openvino {converted.precision}"] = timed(lambda: converted(image), study.repeats)  # noqa: B023
            rows[f"openvino {converted.precision}"]["first_call"] = first
        traced = torch.jit.trace(stage.float(), image[..., :128, :128].clone(), check_trace=False)
        static = ov.convert_model(traced, input=[list(image.shape)])
        for name, model, threads in (("static shapes", static, 0), ("1 thread", static, 1)):
            hints = {"INFERENCE_PRECISION_HINT": converted.precision, "INFERENCE_NUM_THREADS": threads}
            compiled = core.compile_model(model, "CPU", hints)
            rows[f"openvino {converted.precision}, {name}"] = timed(lambda: compiled(image.numpy()), study.repeats)  # noqa: B023
        results[size] = rows
    return results


def span(value: Results) -> str:
    return f"{value['median']:.2f} ({value['min']:.2f}-{value['max']:.2f})"


def markdown(results: Results) -> str:
    """Tables of what was measured."""
    lines = [f"Measured {results['date']} on {results['machine']['cores']} cores, {results['processor']};"]
    lines += [", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".", ""]
    lines += [f"Command: `{results['command']}`. Load average at the start {results['load']}.", ""]
    for part in ("study", "bundles"):
        if part not in results:
            continue
        names = ("read", "preprocess", "network", "restore", "write", "measure", "picture")
        columns = ("seconds", "processor seconds", "first", *names, "outside / network", "of processor")
        lines += [f"| size | engine | {' | '.join(columns)} |", "|---|---|" + "--:|" * len(columns)]
        for model, engines in results[part].items():
            for engine, row in engines.items():
                stages = " | ".join(f"{row['stages'][name]:.3f}" for name in names)
                used = f"{engine} {row['in_use'].get('precision', '')}"
                cells = [span(row["wall"]), span(row["cpu"]), f"{row['first']:.1f}", stages]
                cells += [f"{row['outside_share']:.2f}", f"{row['outside_share_cpu']:.2f}"]
                lines += [f"| {model} | {used} | {' | '.join(cells)} |"]
        lines += [""]
    if "nnunet" in results:
        lines += [
            "| size | ours, file to picture | nnU-Net, array to mask | ratio | of processor |",
            "|---|--:|--:|--:|--:|",
        ]
        lines += [
            f"| {size} | {span(row['ours'])} | {row['nnunet']:.1f} | {row['ratio']:.0f} | {row['ratio_cpu']:.0f} |"
            for size, row in results["nnunet"].items()
        ] + [""]
    if "agreement" in results:
        part = results["agreement"]
        lines += ["| case | label mL | fast mL | full mL | fast, full | fast, label | full, label |"]
        lines += ["|---|" + "--:|" * 6]
        lines += [
            f"| {r['case']} | {r['label_ml']:.2f} | {r['fast_ml']:.2f} | {r['full_ml']:.2f} | {r['fast_full']:.3f} | "
            f"{r['fast_label']:.3f} | {r['full_label']:.3f} |"
            for r in part["cases"]
        ]
        for group, n in (("all", part["n"]), ("bleeding", part["n_bleeding"])):
            means = " | ".join(f"{part['means'][key][group]:.3f}" for key in part["means"])
            lines += [f"| mean of {n} ({group}) | | | | {means} |"]
        lines += [
            "",
            f"Seconds for all cases: fast {part['seconds']['fast']:.1f}, full {part['seconds']['full']:.1f}.",
            "",
        ]
    if "memory" in results:
        lines += ["| size | engine | peak GiB | before the scan | seconds |", "|---|---|--:|--:|--:|"]
        lines += [
            f"| {size} | {engine} | {row['peak_gib']:.2f} | {row['before_gib']:.2f} | {row['seconds']:.1f} |"
            for size, engines in results["memory"].items()
            for engine, row in engines.items()
        ] + [""]
    if "engines" in results:
        lines += ["| size, window | one stage by | seconds (range) | first call |", "|---|---|--:|--:|"]
        for size, rows in results["engines"].items():
            window = "x".join(map(str, rows["window"]))
            lines += [
                f"| {size}, {window} | {name} | {span(row)} | {row.get('first_call', float('nan')):.1f} |"
                for name, row in rows.items()
                if name != "window"
            ]
        lines += [""]
    return "\n".join(lines).replace("| nan |", "| |")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("study", "nnunet", "agreement", "memory", "engines")
    parser.add_argument("parts", nargs="*", choices=(*parts, "bundles", "one", []), help="default: all that can be run")
    parser.add_argument("--bundles", type=Path, nargs="+", default=[], help="trained bundles, for bundles")
    parser.add_argument("--bundle", type=Path, help="trained bundle of the preset's size")
    parser.add_argument("--demo", type=Path, help="folder of `ich-pipeline demo`, for agreement; gives --bundle too")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=tuple(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    for internal in ("--folder", "--size", "--engine"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    given = parser.parse_args()
    trained = given.bundle or (given.demo / "run" / "bundle" if given.demo else None)
    if given.parts == ["one"]:
        part_one(Path(given.folder), trained, given.size, given.engine)
        return
    chosen = given.parts or [part for part in parts if part != "agreement" or given.demo]
    if "bundles" in chosen and not given.bundles:
        parser.error("bundles needs --bundles")
    if "agreement" in chosen and not given.demo:
        parser.error("agreement needs --demo")
    results: Results = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "processor": processor(),
        "machine": machine(),
        "command": " ".join(["benchmarks/run.py", *chosen]),
        "load": [round(x, 1) for x in os.getloadavg()],
    }
    with tempfile.TemporaryDirectory() as folder:
        study = make_study(Path(folder), given.repeats, trained, tuple(given.sizes))
        work = {
            "study": lambda: part_study(study),
            "bundles": lambda: part_bundles(study, given.bundles),
            "nnunet": lambda: part_nnunet(study),
            "agreement": lambda: part_agreement(given.demo),
            "memory": lambda: part_memory(study),
            "engines": lambda: part_engines(study),
        }
        for part in chosen:
            print(f"{part} ...", file=sys.stderr)
            results[part] = work[part]()
            results["versions"] = versions()
            write_json(given.out / "speed.json", results)
            (given.out / "speed.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
