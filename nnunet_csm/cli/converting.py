"""Releases of others to raw datasets, and predictions to submissions."""

import argparse
import importlib
from pathlib import Path

from nnunet_csm import nnunet
from nnunet_csm.cli.flags import NUM_PROCESSES, Commands


def declare(commands: Commands) -> None:
    p = commands.add(
        "convert",
        "A release to an nnU-Net raw dataset: series on one grid, zeros for missing ones, a manifest, splits by patient.",
        "nnunet_csm convert table -i series.csv -d 501 -name Prostate -reference T2w",
        convert,
    )
    formats = Commands(p, "formats", "FORMAT", dest="format")
    readers = {}
    for name, what, example in (
        ("bt_msd", "the decathlon's Task01_BrainTumour, or another of its MRI tasks", "-i Task01_BrainTumour -d 1"),
        ("prostate158", "Prostate158 as on Zenodo", "-i prostate158 -d 158 -task zones"),
        ("breast2023", "breast lesions in the shape of the paper's Breast2023", "-i breast -d 502"),
        ("picai", "PI-CAI's public training data with picai_labels", "-i picai -d 503"),
        ("table", "any dataset from a CSV or TSV, DICOM folders included", "-i series.csv -d 501 -name Mine -labels tumour=1"),
        ("bids", "a BIDS folder, masks in its derivatives", "-i bids -d 504 -class_column grade"),
    ):
        readers[name] = p = formats.add(name, what, f"nnunet_csm convert {name} {example}", convert)
        _add_conversion(p)
    readers["bt_msd"].add_argument(
        "--regions", "-regions", action="store_true", help="overlapping regions WT, TC, ET instead of labels"
    )
    readers["prostate158"].add_argument("-task", help="prostate, zones or tumor")
    readers["picai"].add_argument("-task", help="both, gland or lesion")
    for p in (readers["table"], readers["bids"]):
        p.add_argument("-labels", nargs="+", metavar="NAME=VALUE", help="what the values of the masks mean")
    readers["bids"].add_argument("-class_column", help="column of participants.tsv with the class")
    readers["bids"].add_argument("-mask", help="which mask of the derivatives; none for no mask")

    p = formats.add(
        "to_msd",
        "the way out: predictions as the archive of a decathlon submission, after checking every case",
        "nnunet_csm convert to_msd -i out -o submission.zip -task Task01_BrainTumour",
        convert_to_msd,
    )
    p.add_argument("-i", nargs="+", required=True, help="folders written by nnUNetv2_predict, one for each task")
    p.add_argument("-o", required=True, help="archive to write, ending in .zip")
    p.add_argument("-task", nargs="+", required=True, help="the decathlon's task folders, in the order of -i")
    p.add_argument(
        "-labels_from",
        nargs="+",
        default=[],
        help="dataset.json, its folder, or an nnU-Net dataset, one for each task; default: beside the predictions",
    )
    p.add_argument("-leave_out", nargs="+", default=[], metavar="CASE", help="test cases not to be in the archive")
    p.add_argument("--overwrite", action="store_true", help="replace an archive of that name")

    p = formats.add(
        "to_dicom",
        "the way out: predictions as DICOM segmentations (of classify: reports) that refer to the series they were made from",
        "nnunet_csm convert to_dicom -i out -dicom 501 -o segmentations",
        convert_to_dicom,
    )
    p.add_argument(
        "-i",
        required=True,
        help="folder written by nnUNetv2_predict, or one label map of it; or the CSV that nnunet_csm classify writes, for a "
        "structured report of each case",
    )
    p.add_argument(
        "-dicom",
        required=True,
        help="DICOM series whose grid predictions have: a folder with one series, a folder with a folder for each case, a CSV "
        "with the columns case and path (and volume), or the name or ID of a dataset that was converted from DICOM",
    )
    p.add_argument("-o", required=True, help="folder to write, one file for each case; the codes that were used go beside it")
    p.add_argument("-labels_from", help="dataset.json, its folder, or an nnU-Net dataset; default: beside the predictions")
    p.add_argument(
        "-codes",
        help="what the labels are in DICOM's words: JSON in dcmqi's form; of a report, JSON as it is written beside -o; default: "
        "what their names tell",
    )
    p.add_argument("--overwrite", action="store_true", help="replace a folder of that name, once the new one is complete")


def convert(args: argparse.Namespace) -> int:
    options = {name: getattr(args, name, None) for name in ("regions", "task", "labels", "class_column", "mask")}
    # installed beside the package, see setup.py
    importlib.import_module("nnunet_csm.dataset_conversion").convert(
        args.format,
        Path(args.i),
        Path(args.o) if args.o else nnunet.folder("nnUNet_raw"),
        args.dataset_id,
        args.name,
        {name: value for name, value in options.items() if value not in (None, False)},
        reference=args.reference,
        register=args.register,
        zero_background=args.zero_background,
        overwrite=args.overwrite,
        strict=args.strict,
        num_processes=args.np,
    )
    return 0


def convert_to_msd(args: argparse.Namespace) -> int:
    predictions, tasks = [Path(i) for i in args.i], [Path(task) for task in args.task]
    to_msd = importlib.import_module("nnunet_csm.dataset_conversion.to_msd")
    to_msd.write(predictions, Path(args.o), tasks, args.labels_from, args.leave_out, args.overwrite)
    return 0


def convert_to_dicom(args: argparse.Namespace) -> int:
    to_dicom = importlib.import_module("nnunet_csm.dataset_conversion.to_dicom")
    codes = Path(args.codes) if args.codes else None
    to_dicom.write(to_dicom.DicomRequest(Path(args.i), args.dicom, Path(args.o), args.labels_from, codes, args.overwrite))
    return 0


def _add_conversion(p: argparse.ArgumentParser) -> None:
    """What is read, and what is made of it."""
    p.add_argument("-i", required=True, help="folder of the release; for table, the CSV or TSV file")
    p.add_argument("-d", dest="dataset_id", metavar="ID", type=int, required=True, help="ID of the new dataset, 1 to 999")
    p.add_argument("-o", help="where the dataset goes; default: nnUNet_raw")
    p.add_argument("-name", help="name of the new dataset; default: that of the format")
    p.add_argument("-reference", default="finest", help="series whose grid a case gets, or finest")
    p.add_argument("--register", action="store_true", help="move every series rigidly onto the reference where that helps")
    p.add_argument(
        "--zero_background", action="store_true", help="shift series whose background is not 0 (z-scored ones), so that it is"
    )
    p.add_argument("--overwrite", action="store_true", help="replace a dataset of this name, once the new one is complete")
    p.add_argument("--strict", action="store_true", help="a case that cannot be used is an error, not left out with a report")
    p.add_argument("-np", type=int, default=NUM_PROCESSES, help="processes")
