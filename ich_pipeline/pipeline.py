"""The whole flow for one case, on one screen."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ich_pipeline.dicom.identifiers import read_identifiers
from ich_pipeline.dicom_out import Algorithm, write_results
from ich_pipeline.errors import ReadError
from ich_pipeline.inference import Loaded, Prediction, Segmenter
from ich_pipeline.pictures import montage, write_png
from ich_pipeline.quality import scan_flags
from ich_pipeline.records import CaseRecord, NativeMask, Scan
from ich_pipeline.report import CaseRow
from ich_pipeline.restoring import write_mask
from ich_pipeline.run_report import RunReport
from ich_pipeline.volumetry import (
    VolumeReport,
    measure,
    with_ensemble_band,
    with_lesion_scores,
    with_probability_band,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pipeline:
    """A bundle made ready, and where its results go.

    Attributes:
        masks: folder of `<case_id>.nii.gz`.
        pictures: folder of `<case_id>.png`, or None for no pictures.
        report: takes seconds and memory of every stage.
        regions: folder of what a cascade's first stage found, `<case_id>.nii.gz`; None where nobody asks for it.
        probabilities: folder of the probabilities, `<case_id>.nii.gz`, 0 to 255; None where nobody asks for them.
        dicom: also write mask and volumes of a DICOM scan as DICOM, beside the mask: `auto` flags a case whose headers
            do not allow it (`no_dicom_results`), True makes it fail, False writes none.
        keep_identifiers: also put into the row whom a DICOM scan is of.
        edema: folder of what a network took for edema, `<case_id>.nii.gz`, where it was asked for an estimate.
        uncertainty: folder of where an ensemble's members disagree, `<case_id>.nii.gz`: standard deviation times 255.
    """

    segmenter: Segmenter
    masks: Path
    pictures: Path | None
    report: RunReport
    regions: Path | None = None
    probabilities: Path | None = None
    dicom: bool | str = "auto"
    keep_identifiers: bool = False
    uncertainty: Path | None = None
    edema: Path | None = None

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
        """Native mask to files, volumes and picture."""
        scan, mask = prediction.scan, prediction.mask
        stage = partial(self.report.stage, case_id=scan.case_id)
        mask_file = self.masks / f"{scan.case_id}.nii.gz"
        with stage("measure"):
            volumes = measure(scan.case_id, mask)
            if prediction.member_ml:
                volumes = with_ensemble_band(volumes, prediction.member_ml)
            else:
                volumes = with_probability_band(volumes, prediction.probability, self.segmenter.threshold, scan.grid)
            if prediction.instance_scores:
                volumes = with_lesion_scores(volumes, mask, prediction.probability)
            extra = self._series_columns(scan) | self._edema_column(prediction)
        flags = scan.flags + prediction.flags
        if self.dicom and scan.series:
            with stage("dicom"):
                flags += self._write_dicom(scan, mask, volumes)
        with stage("write"):  # after DICOM: a case with a mask has all its files
            write_mask(mask_file, mask.values, scan.grid, scan.forms)
            if self.regions and prediction.regions:
                write_mask(self.regions / mask_file.name, prediction.regions.values, scan.grid, scan.forms)
            if self.edema and prediction.edema_estimate:
                write_mask(self.edema / mask_file.name, prediction.edema_estimate.values, scan.grid, scan.forms)
            if self.uncertainty and prediction.spread is not None:
                eight_bits = np.rint(prediction.spread * 255).astype(np.uint8)
                write_mask(self.uncertainty / mask_file.name, eight_bits, scan.grid, scan.forms)
            if self.probabilities:
                eight_bits = np.rint(prediction.probability * 255).astype(np.uint8)
                write_mask(self.probabilities / mask_file.name, eight_bits, scan.grid, scan.forms)
        with stage("quality"):
            border = ("touches_border",) if volumes.touches_border else ()
            flags += scan_flags(scan.image_hu, scan.grid) + border
        if self.pictures:
            with stage("picture"):
                picture = montage(scan.image_hu, mask, case_id=scan.case_id, report=volumes, flags=flags)
                write_png(self.pictures / f"{scan.case_id}.png", picture)
        return CaseRow(
            case_id=scan.case_id,
            status="ok",
            flags=flags,
            image=scan.source,
            mask=mask_file,
            report=volumes,
            bundle=self.segmenter.name,
            weights_sha256=self.segmenter.weights_sha256 or "",
            extra=extra,
        )

    def _series_columns(self, scan: Scan) -> dict[str, str]:
        if scan.series is None:
            return {}
        who = read_identifiers(scan.source, scan.case_id, scan.series.uid) if self.keep_identifiers else {}
        return scan.series.columns() | who

    @staticmethod
    def _edema_column(prediction: Prediction) -> dict[str, str]:
        edema = prediction.edema_estimate
        return {} if edema is None else {"edema_estimate_ml": f"{edema.grid.foreground_ml(edema.values):.6f}"}

    def _write_dicom(self, scan: Scan, mask: NativeMask, volumes: VolumeReport) -> tuple[str, ...]:
        """SEG and SR of a case, and the flag of one that cannot have them."""
        algorithm = Algorithm(self.segmenter.name, self.segmenter.version, self.segmenter.weights_sha256 or "")
        try:
            write_results(self.masks, scan, mask, volumes, algorithm)
        except ReadError as error:
            if self.dicom is True:
                raise
            log.warning("%s The volume stands; there is no DICOM SEG and SR.", error)
            return ("no_dicom_results",)
        return ()
