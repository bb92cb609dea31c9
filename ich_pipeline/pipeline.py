"""The whole flow for one case, on one screen."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ich_pipeline.inference import Loaded, Prediction, Segmenter
from ich_pipeline.pictures import montage, write_png
from ich_pipeline.records import CaseRecord
from ich_pipeline.report import CaseRow
from ich_pipeline.restoring import write_mask
from ich_pipeline.run_report import RunReport
from ich_pipeline.volumetry import measure, with_probability_band


@dataclass(frozen=True)
class Pipeline:
    """A bundle made ready, and where its results go.

    Attributes:
        masks: folder of `<case_id>.nii.gz`.
        pictures: folder of `<case_id>.png`, or None for no pictures.
        report: takes seconds and memory of every stage.
        regions: folder of what a cascade's first stage found, `<case_id>.nii.gz`; None where nobody asks for it.
        probabilities: folder of the probabilities, `<case_id>.nii.gz`, 0 to 255; None where nobody asks for them.
    """

    segmenter: Segmenter
    masks: Path
    pictures: Path | None
    report: RunReport
    regions: Path | None = None
    probabilities: Path | None = None

    def run(self, case: CaseRecord) -> CaseRow:
        """One case from its file to its row; `batch.py` overlaps the three steps of different cases."""
        loaded = self.read(case)
        prediction = self.segment(loaded)
        return self.finish(prediction)

    def read(self, case: CaseRecord) -> Loaded:
        """File or series to scan, scan to model grid."""
        return self.segmenter.read(case, partial(self.report.stage, case_id=case.case_id))

    def segment(self, loaded: Loaded) -> Prediction:
        """Model grid to scores, scores to native mask."""
        stage = partial(self.report.stage, case_id=loaded.scan.case_id)
        return self.segmenter.segment(loaded, stage, with_regions=self.regions is not None)

    def finish(self, prediction: Prediction) -> CaseRow:
        """Native mask to file, volumes and picture."""
        scan, mask = prediction.scan, prediction.mask
        stage = partial(self.report.stage, case_id=scan.case_id)
        mask_file = self.masks / f"{scan.case_id}.nii.gz"
        with stage("measure"):
            volumes = with_probability_band(
                measure(scan.case_id, mask), prediction.probability, self.segmenter.threshold, scan.grid
            )
        with stage("write"):
            write_mask(mask_file, mask.values, scan.grid, scan.forms)
            if self.regions and prediction.regions:
                write_mask(self.regions / mask_file.name, prediction.regions.values, scan.grid, scan.forms)
            if self.probabilities:
                eight_bits = np.rint(prediction.probability * 255).astype(np.uint8)
                write_mask(self.probabilities / mask_file.name, eight_bits, scan.grid, scan.forms)
        if self.pictures:
            with stage("picture"):
                picture = montage(scan.image_hu, mask, case_id=scan.case_id, report=volumes)
                write_png(self.pictures / f"{scan.case_id}.png", picture)
        return CaseRow(
            case_id=scan.case_id,
            status="ok",
            flags=scan.flags + self.segmenter.flags,
            image=scan.source,
            mask=mask_file,
            report=volumes,
            bundle=self.segmenter.bundle.name,
            weights_sha256=self.segmenter.weights_sha256 or "",
        )
