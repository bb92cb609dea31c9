"""Who a DICOM series is of, for those who asked (`--keep-identifiers`). Nothing else reads these elements."""

from pathlib import Path

import pydicom

from ich_pipeline.dicom.archive import as_folder
from ich_pipeline.dicom.stack import find_slices
from ich_pipeline.errors import ReadError

COLUMNS = {  # element: column of volumes.csv
    "PatientID": "patient_id",
    "PatientName": "patient_name",
    "PatientBirthDate": "patient_birth_date",
    "StudyDate": "study_date",
    "AccessionNumber": "accession_number",
    "StudyInstanceUID": "study_uid",
}


def read_identifiers(path: Path, case_id: str, series_uid: str) -> dict[str, str]:
    """Columns of identifiers of the series that a scan was read from; what its header lacks is empty.

    Raises:
        ReadError: the series is not there any more, or its header cannot be read.
    """
    with as_folder(path, case_id) as folder:
        first = find_slices(folder, case_id, series_uid or None).images[0]
        try:
            with pydicom.config.disable_value_validation():  # it would quote values in warnings
                header = pydicom.dcmread(first.path, force=True, stop_before_pixels=True, specific_tags=list(COLUMNS))
                return {column: " ".join(str(header.get(name) or "").split()) for name, column in COLUMNS.items()}
        except Exception as error:  # pydicom raises many kinds on damaged values, and quotes them
            raise ReadError(
                f"{case_id}: the patient's elements in {first.path.name} cannot be read ({type(error).__name__}), "
                "expected valid ones. Correct them, or leave out --keep-identifiers."
            ) from None
