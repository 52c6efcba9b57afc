"""nnU-Net's export of predictions, with files that are whole or not there."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_csm.errors import UserError, no_room, reason
from nnunet_csm.files import workplace
from nnunet_csm.processes import follow_parent

# in the workplace: an export has failed, so that nothing more need be predicted
FAILED = "failed"


@contextmanager
def whole_exports(host: ModuleType, folder: Path) -> Iterator[Path]:
    """Have a module of nnU-Net's that predicts into a folder write whole files only.

    Returns:
        The workplace in the folder. Its file `FAILED` is there when an export could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with workplace(folder) as unfinished:
        # its loops have no other place where the function that processes are to run could be given
        before = host.export_prediction_from_logits
        host.export_prediction_from_logits = partial(export_whole, unfinished)  # type: ignore[attr-defined]
        try:
            yield unfinished
        finally:
            host.export_prediction_from_logits = before  # type: ignore[attr-defined]


def export_whole(
    unfinished: Path,
    logits: Any,
    properties: dict[str, Any],
    configuration: ConfigurationManager,
    plans: PlansManager,
    dataset_json: dict[str, Any],
    output_file_truncated: str,
    save_probabilities: bool = False,
) -> None:
    """Do as nnU-Net's `export_prediction_from_logits`, read back what was written, and only then give it its name.

    Args:
        unfinished: a folder on the disk of the output.

    Raises:
        UserError: there is no room, or what was written is not what is read.
    """
    follow_parent()
    final = Path(output_file_truncated)
    # the segmentation comes last, since it says that a case is done
    names = [f"{final.name}{ending}" for ending in (".npz", ".pkl", dataset_json["file_ending"])]
    segmentation, begun = final.with_name(names[-1]), unfinished / final.name
    try:
        export_prediction_from_logits(logits, properties, configuration, plans, dataset_json, str(begun), save_probabilities)
        shape = [properties["shape_before_cropping"][axis] for axis in plans.transpose_backward]
        if not is_whole(begun, dataset_json["file_ending"], plans.image_reader_writer_class(), save_probabilities, shape):
            raise UserError(f"{segmentation}: was cut off while it was written; look at its disk, and predict again")
        for name in names:
            if (unfinished / name).exists():
                (unfinished / name).replace(final.with_name(name))
    except Exception as error:
        with suppress(OSError):
            (unfinished / FAILED).touch()
        if no_room(error, unfinished):
            said = f" ({reason(error)})" if not isinstance(error, UserError) else ""
            raise UserError(f"{segmentation}: there is no room for it{said}; free some space on its disk, and go on") from None
        raise
    finally:
        for name in names:
            (unfinished / name).unlink(missing_ok=True)


def is_whole(
    truncated: Path, ending: str, reader: BaseReaderWriter, with_probabilities: bool, shape: list[int] | None = None
) -> bool:
    """Whether a case's segmentation, and its probabilities, can be read to the end.

    Args:
        truncated: the path without `ending`.
        reader: of nnU-Net's.
        shape: (z, y, x) that is expected.
    """
    path = truncated.with_name(f"{truncated.name}{ending}")
    try:
        if ending in (".nii", ".nii.gz"):
            # ITK fills what is missing at the end with zeros
            np.asanyarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]
        found = list(reader.read_seg(str(path))[0].shape[1:])
        if with_probabilities:
            with zipfile.ZipFile(path.with_name(f"{truncated.name}.npz")) as archive:
                if archive.testzip() is not None or not path.with_name(f"{truncated.name}.pkl").is_file():
                    return False
    except Exception:  # whatever libraries make of half a file
        return False
    return shape is None or found == shape
