"""The whole main job on synthetic scans, and where its results are."""

from pathlib import Path

from ich_pipeline import commands
from ich_pipeline.commands import Settings
from ich_pipeline.manifest import read_manifest
from ich_pipeline.phantom import write_dataset

SYNTHETIC = "These are synthetic phantoms: the numbers say that the software works, nothing about patients."


def run_demo(out: Path, cases: int, seed: int) -> int:
    """Make phantoms, train `cascade3d`, evaluate on held-out cases, measure a folder, draw, and say where it all is.

    Args:
        out: folder for everything; what an earlier demo left there is gone on with where it fits.
        cases: phantoms to make; about 60 % train, 10 % validate, 30 % test.
        seed: of phantoms and training.

    Returns:
        0, or 1 when a case failed.
    """
    import sys

    from tqdm import tqdm

    with tqdm(total=cases, desc="phantoms", unit="case", file=sys.stderr) as bar:
        manifest = write_dataset(out / "phantoms", cases, seed, on_case=lambda case_id: bar.update())
    shared = [f"tracking_uri=sqlite:///{(out / 'mlflow.db').resolve()}", "experiment=demo"]
    train = [
        "bundle=cascade3d",
        f"data={manifest}",
        "preset=cpu",
        f"seed={seed}",
        f"out={out / 'run'}",
        "overwrite=true",
    ]
    commands.train(Settings.of([*train, *shared]))
    bundle = f"bundle={out / 'run' / 'bundle'}"
    status = commands.evaluate(
        Settings.of([bundle, f"data={manifest}", "split=test", f"out={out / 'evaluation'}", "overwrite=true", *shared])
    )
    table = out / "volumes" / "volumes.csv"
    held_out = [case.image for case in read_manifest(manifest) if case.split == "test"]
    status |= commands.segment(held_out, table.parent / "masks", table, Settings.of([bundle, "overwrite=true"]))
    print(f"""
{SYNTHETIC}
held-out cases   {out / "evaluation" / "evaluation.md"} (scores), evaluation.csv (a row a case), plots
pictures         {out / "evaluation" / "pictures"}
batch volumes    {table}, lesions.csv, run.json, masks/, pictures/
report           {table.with_name("report.html")} (open it in a browser: table, pictures, plots)
trained bundle   {out / "run" / "bundle"}
MLflow           mlflow ui --backend-store-uri sqlite:///{out / "mlflow.db"}""")
    return status
