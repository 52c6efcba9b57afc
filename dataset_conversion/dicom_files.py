"""What every way out to DICOM does: a file a case, made by highdicom, that refers to the case's series, or nothing at all."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_csm import __version__
from nnunet_csm.errors import UserError, reason
from nnunet_csm.files import whole_folder
from nnunet_csm.raw.manifest import software
from nnunet_csm.raw.subjects import CaseError, Volume

from .dicom_codes import Code
from .dicom_sources import find_series

MOST_PROBLEMS = 5
REMEDY = (
    "give the folder of one series, one with a folder for each case, a table with the columns case and path, or a dataset that "
    "was converted from DICOM"
)


@dataclass(frozen=True)
class DicomRequest:
    """What `convert to_dicom` is asked for.

    Attributes:
        predictions: folder as nnUNetv2_predict leaves it, or one label map of it; or the CSV that `classify` writes.
        dicom: the series whose grids predictions have, see `find_series`.
        output: folder for one file a case, CASE.dcm.
        labels_from: where labels are named: a dataset.json, its folder, or an nnU-Net dataset; None: beside the predictions.
        codes: what labels or classes are in DICOM's words; None for what their names tell.
        overwrite: replace a folder of that name.
    """

    predictions: Path
    dicom: str
    output: Path
    labels_from: str | None = None
    codes: Path | None = None
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """Where the predictions lie, with what nnU-Net wrote beside them."""
        return self.predictions.parent if self.predictions.is_file() else self.predictions

    @property
    def used_codes(self) -> Path:
        """Where the codes that were used are written, to be edited."""
        return self.output.with_name(f"{self.output.name}.codes.json")


def highdicom_library() -> Any:
    """The optional library that writes DICOM."""
    try:
        import highdicom
    except ImportError:
        raise UserError("DICOM segmentations and reports need highdicom; pip install 'nnunet_csm[dicom]'") from None
    return highdicom


def concept(code: Code) -> Any:
    """A code as highdicom has it."""
    return highdicom_library().sr.CodedConcept(code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning)


def equipment(command: str) -> dict[str, Any]:
    """What a file says of the software that wrote it."""
    versions = software("highdicom", "nnunetv2")
    return {
        "manufacturer": "nnunet_csm",
        "manufacturer_model_name": command,
        "software_versions": [f"{name} {versions[name]}" for name in ("nnunet_csm", "nnunetv2", "highdicom")],
        "device_serial_number": __version__,
        "specific_character_set": "ISO_IR 192",  # UTF-8: names may be in any script
    }


def write_cases(request: DicomRequest, given: Mapping[str, Path], write_case: Callable[[str, Volume, Path], str]) -> None:
    """Write the file of every case by `write_case(case, series, file)`, which gives a line about it or raises `CaseError`.

    Args:
        request: which series, and the folder.
        given: by case, the file that errors name.
        write_case: makes one file.

    Raises:
        UserError: anything is wrong with any case; nothing is written then.
    """
    series = find_series(request.dicom, list(given))
    times = Counter(volume for case, volume in series.items() if case in given)
    problems = list[str]()
    with whole_folder(request.output, request.overwrite) as folder:
        for case, path in tqdm(given.items(), desc="writing DICOM", unit="case"):
            try:
                if case not in series:
                    raise CaseError(f"{path}: -dicom {request.dicom} tells of no series for {case}; {REMEDY}")
                if times[series[case]] > 1:
                    raise CaseError(f"{path}: {series[case].path} is given for other cases, too; give each case its own series")
                tqdm.write(f"{case}: {write_case(case, series[case], folder / f'{case}.dcm')}")
            except CaseError as error:
                problems.append(str(error))
        if problems:
            more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
            listed = [f"nothing was written, {len(problems)} thing(s) to mend:", *problems[:MOST_PROBLEMS], *more]
            raise UserError("\n  ".join(listed))


@contextmanager
def following(volume: Volume) -> Iterator[None]:
    """What highdicom raises inside becomes a `CaseError` that names the series; what it warns of is not shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (CaseError, OSError):
        raise
    except Exception as error:
        what = f"{volume.path}: highdicom cannot follow its headers ({type(error).__name__}: {reason(error)})"
        raise CaseError(f"{what}; correct them, or export the series again") from error
