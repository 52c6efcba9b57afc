"""A small dataset with everything that is made of it, and the commands that read its files."""

import json
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import damage
import nibabel
import numpy as np
import SimpleITK as sitk
import warm_processes
from damage import Damage

from nnunet_csm.dataset_conversion.dicom_codes import Codes, default_segment, save_codes

NAME = "Dataset900_Phantom"
PRE, RAW, TASK = f"pre/{NAME}", f"raw/{NAME}", "Task90_Phantom"
RESULTS = f"res/{NAME}"
PRETRAINED, SEGMENTER, CLASSIFIER = (
    f"{RESULTS}/nnUNetTrainerCSM{kind}__nnUNetCSMPlans__3d_fullres/fold_0" for kind in ("Pretrain", "", "Classifier")
)
PLANS = f"{PRE}/nnUNetCSMPlans.json"
VOLUMES = f"{PRE}/nnUNetPlans_3d_fullres"
TRAIN = ("-d", "900", "-f", "0", "-device", "cpu")
PREDICT = (*TRAIN, "-i", f"{RAW}/imagesTs")
IN_ONE_PROCESS = ("-npp", "0", "-nps", "0", "--disable_tta", "--disable_progress_bar")

OURS = damage.with_wrong_types(damage.JSON)


@dataclass(frozen=True)
class Command:
    """A command line with paths below the workshop, and the files it reads, by pattern, with what may happen to them."""

    arguments: tuple[str, ...]
    reads: dict[str, tuple[Damage, ...]]
    before: tuple[str, ...] = ()  # what is not there yet when it runs

    @property
    def name(self) -> str:
        return " ".join(word for word in self.arguments[:2] if not word.startswith("-"))


COMMANDS = (
    Command(
        ("convert", "bt_msd", "-i", TASK, "-d", "901", "-np", "1"),
        {f"{TASK}/dataset.json": damage.JSON, f"{TASK}/imagesTr/*": damage.NIFTI, f"{TASK}/labelsTr/*": damage.MASK},
    ),
    Command(
        ("convert", "table", "-i", "sheet/series.csv", "-d", "902", "-name", "Table", "-labels", "tumour=1", "-np", "1"),
        {"sheet/series.csv": damage.TABLE, "sheet/*_T?w.nii.gz": damage.NIFTI, "sheet/*_mask.nii.gz": damage.MASK},
    ),
    Command(
        ("convert", "table", "-i", "scans/series.csv", "-d", "903", "-name", "Dicom", "-np", "1"),
        {"scans/S0/*": damage.ANY_FILE},
    ),
    Command(
        ("convert", "bids", "-i", "release", "-d", "904", "-name", "Bids", "-class_column", "grade", "-np", "1"),
        {
            "release/participants.tsv": damage.TABLE,
            "release/sub-*/*/*.nii.gz": damage.NIFTI,
            "release/sub-*/dwi/*.bval": damage.without(damage.ANY_FILE, "cut off"),  # 100 of 1000 is a number
            "release/derivatives/*/*/*/*": damage.MASK,
        },
    ),
    Command(
        ("plan_and_preprocess", "-d", "900", "-preset", "tiny.json", "-np", "1"),
        {
            f"{RAW}/dataset.json": damage.JSON,
            f"{RAW}/imagesTr/*": damage.NIFTI,
            f"{RAW}/labelsTr/*": damage.MASK,
            f"{RAW}/classification.csv": damage.TABLE,
            "tiny.json": OURS,
        },
        before=(PRE, RESULTS),
    ),
    Command(
        ("plan", "-d", "900", "-preset", "tiny.json", "-np", "1"),
        {
            f"{PRE}/nnUNetPlans.json": damage.JSON,
            f"{PRE}/dataset.json": damage.JSON,
            f"{PRE}/csm_fingerprint.json": damage.made_anew(damage.JSON),
            f"{PRE}/splits_final.json": damage.JSON,
        },
    ),
    Command(
        ("pretrain", *TRAIN),
        {
            PLANS: damage.JSON,
            f"{PRE}/dataset.json": damage.JSON,
            f"{PRE}/splits_final.json": damage.JSON,
            f"{VOLUMES}/*[0-9].b2nd": damage.ANY_FILE,
            f"{VOLUMES}_csm/*.pt": damage.made_anew(damage.ANY_FILE),
        },
        before=(PRETRAINED,),
    ),
    # where there is no checkpoint, nnU-Net begins afresh and says so
    Command(
        ("pretrain", *TRAIN, "--c"),
        {f"{PRETRAINED}/checkpoint_final.pth": damage.without(damage.CHECKPOINT, "a link", "a pipe", "a folder")},
    ),
    Command(
        ("finetune", *TRAIN),
        {
            PLANS: damage.JSON,
            f"{PRE}/splits_final.json": damage.JSON,
            f"{VOLUMES}/*.b2nd": damage.ANY_FILE,
            f"{VOLUMES}/*.pkl": damage.PICKLE,
            f"{PRETRAINED}/checkpoint_final.pth": damage.CHECKPOINT,
        },
        before=(SEGMENTER,),
    ),
    Command(
        ("finetune", *TRAIN, "-tr", "nnUNetTrainerCSMClassifier"),
        {f"{PRE}/classification.csv": damage.TABLE, f"{VOLUMES}/*_seg.b2nd": damage.ANY_FILE},
        before=(CLASSIFIER,),
    ),
    Command(
        ("predict", *PREDICT, "-o", "out", *IN_ONE_PROCESS),
        {
            f"{RAW}/imagesTs/*": damage.NIFTI,
            f"{Path(SEGMENTER).parent}/plans.json": damage.JSON,
            f"{Path(SEGMENTER).parent}/dataset.json": damage.JSON,
            f"{SEGMENTER}/checkpoint_final.pth": damage.CHECKPOINT,
        },
    ),
    Command(
        ("predict", "--fill_missing_only", "-d", "900", "-i", f"{RAW}/imagesTs", "-o", "out"),
        {f"{RAW}/imagesTs/*": damage.NIFTI, f"{PRE}/dataset.json": damage.JSON},
    ),
    Command(
        ("classify", *PREDICT, "-m", "predicted", "-o", "out/classes.csv"),
        {
            f"{RAW}/imagesTs/*": damage.NIFTI,
            "predicted/*.nii.gz": damage.MASK,
            f"{Path(CLASSIFIER).parent}/plans.json": damage.JSON,
            f"{CLASSIFIER}/checkpoint_final.pth": damage.CHECKPOINT,
        },
    ),
    Command(
        ("evaluate", "-d", "900", "-ref", f"{TASK}/labelsTs", "-pred", "predicted", "-images", f"{RAW}/imagesTs", "-o", "out"),
        {
            f"{TASK}/labelsTs/*": damage.MASK,
            "predicted/*.nii.gz": damage.MASK,
            f"{RAW}/imagesTs/*": damage.NIFTI,
            f"{RAW}/dataset.json": damage.JSON,
        },
    ),
    Command(
        ("evaluate", "-pred", f"{CLASSIFIER}/validation/predictions.csv", "-o", "out"),
        {f"{CLASSIFIER}/validation/predictions.csv": damage.TABLE},
    ),
    Command(
        ("convert", "to_msd", "-i", "predicted", "-o", "out.zip", "-task", TASK, "-labels_from", f"{RAW}/dataset.json"),
        {"predicted/*.nii.gz": damage.MASK, f"{TASK}/dataset.json": damage.JSON, f"{TASK}/imagesTs/*": damage.NIFTI},
    ),
    Command(
        ("convert", "to_dicom", "-i", "drawn", "-dicom", "scans/drawn.csv", "-o", "out", "-codes", "codes.json"),
        {
            "drawn/*.nii.gz": damage.MASK,
            "drawn/dataset.json": damage.JSON,
            "scans/drawn.csv": damage.TABLE,
            "scans/S0/T2w/*": damage.ANY_FILE,
            "codes.json": OURS,
        },
    ),
    Command(("study", "study.json", "-d", "900", "-device", "cpu", "-preset", "tiny.json", "--dry_run"), {"study.json": OURS}),
    Command(
        ("doctor", "-d", "900"),
        {f"{RAW}/dataset.json": damage.JSON, PLANS: damage.JSON, f"{PRE}/splits_final.json": damage.JSON},
    ),
)


def start(root: Path, arguments: Sequence[str], limit: int | None = None) -> warm_processes.WarmProcess:
    """Start one command of ours in a warm process, the first of a group of its own; what it says is added to `root`/said.

    Args:
        limit: the largest file it may write, in bytes, as on a disk that is full.
    """
    environment = {
        **{f"nnUNet_{name}": str(root / short) for name, short in (("raw", "raw"), ("preprocessed", "pre"), ("results", "res"))},
        **{"PYTHONWARNINGS": "ignore", "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "MPLBACKEND": "Agg"},
        **{"OMP_NUM_THREADS": "1", "PATH": str(Path(sys.executable).parent), "HOME": str(root), "TMPDIR": str(root)},
    }
    words = [str(root / word) if (root / word).exists() or word.startswith("out") else word for word in arguments]
    return warm_processes.start(_limited, [limit, "nnunet_csm", *words], environment, root / "said", root / "said")


def _limited(limit: int | None, *command: str) -> int | None:
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return warm_processes.console_command(*command)


def run(root: Path, arguments: Sequence[str], timeout: float, limit: int | None = None) -> tuple[int | None, str]:
    """Run one command of ours below `root`; see `start`.

    Returns:
        Its exit code, None when it did not end in time; and all that it said.
    """
    said = root / "said"
    said.unlink(missing_ok=True)
    process = start(root, arguments, limit)
    process.join(timeout)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code, said.read_text("utf-8", errors="replace") if said.exists() else ""


def build(root: Path) -> None:
    """Write the dataset, plan it, train on it, predict."""
    from nnunet_csm.phantom import PhantomSpec, write_task

    spec = PhantomSpec(series=("FLAIR", "T1w"), shape=(16, 32, 32), spacing_mm=(8.0, 5.0, 5.0), missing_share=0.2, diagnoses=True)
    root.mkdir(parents=True)
    for name in ("raw", "pre", "res"):
        (root / name).mkdir()
    write_task(spec, root, 6, 2, task_id=90)
    shutil.copy(Path(__file__).parents[1] / "tiny.json", root)
    shutil.copy(Path(__file__).with_name("study.json"), root)
    study = json.loads((root / "study.json").read_text("utf-8"))
    (root / "scratch.json").write_text(json.dumps({**study, "arms": study["arms"][:1]}))
    for arguments in (
        ("convert", "bt_msd", "-i", TASK, "-d", "900", "-name", "Phantom", "-np", "1"),
        (),
        ("plan_and_preprocess", "-d", "900", "-preset", "tiny.json", "-np", "1"),
        ("pretrain", *TRAIN),
        ("finetune", *TRAIN),
        ("finetune", *TRAIN, "-tr", "nnUNetTrainerCSMClassifier"),
        ("predict", *PREDICT, "-o", "predicted", *IN_ONE_PROCESS),
    ):
        if not arguments:
            shutil.copy(root / TASK / "classification.csv", root / RAW)
            continue
        code, said = run(root, [str(root / a) if a == "predicted" else a for a in arguments], 300)
        assert code == 0, said
    _write_releases(root)


def _write_releases(root: Path) -> None:
    """The same images as a table, as DICOM, with label maps on its slices, and as BIDS."""
    images = [nibabel.Nifti1Image.from_filename(path) for path in sorted((root / TASK / "imagesTr").glob("*.nii.gz"))[:3]]
    labels = [nibabel.Nifti1Image.from_filename(path) for path in sorted((root / TASK / "labelsTr").glob("*.nii.gz"))[:3]]
    for name in ("sheet", "scans", "release/derivatives", "drawn"):
        (root / name).mkdir(parents=True)
    rows, participants, slices = ["subject,series,path,mask,class"], ["participant_id\tgrade"], ["subject,series,path"]
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        voxels = np.asanyarray(image.dataobj).astype(np.float32)
        tumour = nibabel.Nifti1Image((np.asanyarray(label.dataobj) > 0).astype(np.uint8), image.affine)
        series = {name: nibabel.Nifti1Image(voxels[..., channel], image.affine) for channel, name in enumerate(("T2w", "T1w"))}
        grade = ("low", "high")[number % 2]
        subject = root / "release" / f"sub-{number:02d}"
        derived = root / "release" / "derivatives" / "lesions" / subject.name / "anat"
        for folder in (subject / "anat", subject / "dwi", derived):
            folder.mkdir(parents=True)
        for name, one in series.items():
            nibabel.save(one, root / "sheet" / f"S{number}_{name}.nii.gz")
            nibabel.save(one, subject / "anat" / f"{subject.name}_{name}.nii.gz")
            mask = f"S{number}_mask.nii.gz" if name == "T2w" else ""
            rows.append(f"S{number},{name},S{number}_{name}.nii.gz,{mask},{grade if mask else ''}")
        nibabel.save(tumour, root / "sheet" / f"S{number}_mask.nii.gz")
        nibabel.save(tumour, derived / f"{subject.name}_label-lesion_mask.nii.gz")
        both = np.stack([voxels[..., 0], voxels[..., 1] * 0.3], -1)
        nibabel.save(nibabel.Nifti1Image(both, image.affine), subject / "dwi" / f"{subject.name}_dwi.nii.gz")
        (subject / "dwi" / f"{subject.name}_dwi.bval").write_text("0 1000\n")
        participants.append(f"{subject.name}\t{grade}")
        for name in series:
            _write_dicom(root / "scans" / f"S{number}" / name, series[name], number)
            slices.append(f"S{number},{name},S{number}/{name}")
        drawn = sitk.GetImageFromArray(np.asanyarray(label.dataobj).T[::2].astype(np.uint8))
        drawn.SetSpacing([float(edge) * times for edge, times in zip(image.header.get_zooms(), (1, 1, 2), strict=False)])
        sitk.WriteImage(drawn, str(root / "drawn" / f"S{number}.nii.gz"))
    shutil.copy(root / RAW / "dataset.json", root / "drawn")
    (root / "scans" / "drawn.csv").write_text(
        "case,path\n" + "".join(f"S{number},S{number}/T2w\n" for number in range(len(images)))
    )
    save_codes(Codes(), [default_segment(1, "edema", "red")[0]], root / "codes.json")
    (root / "sheet" / "series.csv").write_text("\n".join(rows) + "\n")
    (root / "release" / "participants.tsv").write_text("\n".join(participants) + "\n")
    (root / "release" / "dataset_description.json").write_text('{"Name": "phantom", "BIDSVersion": "1.8.0"}')
    (root / "scans" / "series.csv").write_text("\n".join(slices) + "\n")


def _write_dicom(folder: Path, image: "nibabel.Nifti1Image", number: int) -> None:
    """One file a slice, as scanners store them."""
    folder.mkdir(parents=True)
    volume = sitk.GetImageFromArray(np.asanyarray(image.dataobj).T.astype(np.int16))
    volume.SetSpacing([float(edge) for edge in image.header.get_zooms()[:3]])
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    uid = f"1.2.3.{number + 1}.{sum(map(ord, folder.name))}"
    for z in range(0, volume.GetDepth(), 2):  # every other one: enough, and half the files
        plane = volume[:, :, z : z + 1]
        for tag, value in {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.4",  # MR image storage
            "0008|0018": f"{uid}.{z + 1}",
            "0008|0060": "MR",
            "0020|000d": f"1.2.3.{number + 1}",
            "0020|000e": uid,
            "0020|0052": f"1.2.3.{number + 1}.0",
            "0020|0013": str(z + 1),
            "0020|0032": "\\".join(f"{place:.9g}" for place in plane.GetOrigin()),
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }.items():
            plane.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{z:03d}.dcm"))
        writer.Execute(plane)
