"""The flags of every command: nnU-Net's where it has them."""

import argparse
import os
from collections.abc import Callable
from typing import Any

from nnunet_csm import __version__, commands
from nnunet_csm.commands import CLASSIFIER, FINETUNER, PRETRAINER
from nnunet_csm.machine import num_cores
from nnunet_csm.plans import JOINT_PLANS_NAME, PLANS_NAME, STOCK_PLANS_NAME

Command = Callable[[argparse.Namespace], int]

NUM_PROCESSES = min(8, num_cores())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnunet_csm",
        description="Cross-series masking for nnU-Net v2: pretrain on unlabelled multi-series MRI, fine-tune on few labels.",
        epilog='Stock nnUNetv2_... commands do the same once `eval "$(nnunet_csm env)"` was run.',
    )
    parser.add_argument("--version", action="version", version=f"nnunet_csm {__version__}")
    subcommands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, what: str, example: str, run: Command | None = None, among: Any = subcommands) -> argparse.ArgumentParser:
        """A command; what it does is the function of its name in `commands`, if no other is given."""
        command: argparse.ArgumentParser = among.add_parser(
            name,
            help=what,
            description=what,
            epilog=f"Example: {example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.set_defaults(run=run or getattr(commands, name))
        return command

    p = add(
        "demo", "Run everything on a phantom, on two CPU cores, in minutes, with a summary page.", "nnunet_csm demo -o csm_demo"
    )
    p.add_argument("-o", default="csm_demo", help="output folder; holds the nnU-Net folders of the demo and summary.html")
    p.add_argument("-seed", type=int, default=0, help="seed of the phantom")

    add("env", "Print the export that lets stock nnUNetv2_... commands find our trainers.", 'eval "$(nnunet_csm env)"')

    p = add(
        "doctor",
        "Check versions, folders, GPU, trainers, what a dataset lacks, and its classes by fold.",
        "nnunet_csm doctor -d 21",
    )
    p.add_argument("-d", nargs="+", help="dataset names or IDs")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("--strict", action="store_true", help="exit code 2 also where something is missing or doubtful, a GPU apart")

    p = add(
        "convert",
        "A release to an nnU-Net raw dataset: series on one grid, zeros for missing ones, a manifest, splits by patient.",
        "nnunet_csm convert table -i series.csv -d 501 -name Prostate -reference T2w",
    )
    formats = p.add_subparsers(title="formats", required=True, metavar="FORMAT", dest="format")
    readers = {}
    for name, what, example in (
        ("bt_msd", "the decathlon's Task01_BrainTumour, or another of its MRI tasks", "-i Task01_BrainTumour -d 1"),
        ("prostate158", "Prostate158 as on Zenodo", "-i prostate158 -d 158 -task zones"),
        ("breast2023", "breast lesions in the shape of the paper's Breast2023", "-i breast -d 502"),
        ("picai", "PI-CAI's public training data with picai_labels", "-i picai -d 503"),
        ("table", "any dataset from a CSV or TSV, DICOM folders included", "-i series.csv -d 501 -name Mine -labels tumour=1"),
        ("bids", "a BIDS folder, masks in its derivatives", "-i bids -d 504 -class_column grade"),
    ):
        readers[name] = p = add(name, what, f"nnunet_csm convert {name} {example}", commands.convert, formats)
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

    p = add(
        "to_msd",
        "the way out: predictions as the archive of a decathlon submission, after checking every case",
        "nnunet_csm convert to_msd -i out -o submission.zip -task Task01_BrainTumour",
        commands.convert_to_msd,
        formats,
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

    p = add(
        "fingerprint",
        "Which series every case has, copies in place of missing ones, intensities, geometry, misaligned series; with a picture.",
        "nnunet_csm fingerprint -d 21 -np 8",
    )
    p.add_argument("-d", nargs="+", required=True, help="dataset names or IDs")
    _add_reading(p)

    p = add(
        "plan",
        "Write CSM plans from nnU-Net's plans and the fingerprint; preprocessed data is reused.",
        "nnunet_csm plan -d 21 -gpu_memory_target 40",
    )
    _add_planning(p)

    p = add(
        "split",
        "Write splits_final.json by patient and class: five folds, or repeats of 8:1:1 as in the paper.",
        "nnunet_csm split -d 21 -repeats 10",
    )
    p.add_argument("-d", required=True, help="dataset name or ID")
    p.add_argument("-repeats", type=int, help="this many random splits of 8:1:1 into train, val and test; default: five folds")
    p.add_argument("-seed", type=int, default=12345, help="seed of the splits")
    p.add_argument("--overwrite", action="store_true", help="replace splits that are there")

    p = add(
        "plan_and_preprocess",
        "nnU-Net's fingerprint, plans and preprocessing, then CSM plans; for datasets without labels as well.",
        "nnunet_csm plan_and_preprocess -d 21 -preset B",
    )
    _add_planning(p)
    p.add_argument("--verify_dataset_integrity", action="store_true", help="nnU-Net's thorough check, reads every voxel")
    p.add_argument(
        "-preprocess_only",
        nargs="?",
        const=PLANS_NAME,
        metavar="PLANS",
        help=f"plan nothing: make the images that these CSM plans name and that are not there; without a name {PLANS_NAME}",
    )
    p.add_argument("--overwrite", action="store_true", help="also make again what is there")

    p = add(
        "pretrain",
        "Pretrain the encoder on the images of a fold; with joint plans on several datasets, the first of which owns the run.",
        "nnunet_csm pretrain -d 21 -f 0 -device cpu",
        commands.train,
    )
    p.add_argument("-d", nargs="+", required=True, help="dataset name or ID; several for joint plans")
    _add_training(p, PRETRAINER)
    p.add_argument(
        "-bank",
        choices=("auto", "gpu", "mapped"),
        help="where the volumes are kept (nnUNet_csm_bank); default: the fastest place they fit in. nnUNet_csm_graphs=f: no "
        "CUDA graphs",
    )

    p = add(
        "finetune",
        f"Fine-tune a segmenter from the pretrained encoder; with -tr {CLASSIFIER} a classifier.",
        "nnunet_csm finetune -d 21 -f 0 1 2 --npz",
        commands.train,
    )
    p.add_argument("-d", required=True, help="dataset name or ID")
    _add_training(p, FINETUNER)
    p.add_argument(
        "-encoder",
        help="auto (same fold), all (fold all), scratch, a checkpoint, a folder of export_weights, or OWNER/NAME in the cache of "
        "Hugging Face's hub (nnUNet_csm_encoder); default: what the plans say",
    )
    p.add_argument(
        "--download",
        action="store_const",
        const="1",
        help="fetch OWNER/NAME from the hub where the cache has it not (nnUNet_csm_download=1)",
    )

    p = add(
        "predict",
        "Segment images as nnUNetv2_predict does, in less time, with a check of the inputs; a case may lack series.",
        "nnunet_csm predict -d 21 -f 0 -i in -o out",
    )
    p.add_argument(
        "-i", required=True, help="input folder, with CASE_0000.nii.gz, CASE_0001.nii.gz ..., as far as they are there"
    )
    p.add_argument("-o", required=True, help="output folder")
    _add_model(p, FINETUNER)
    p.add_argument("--save_probabilities", action="store_true", help="write probabilities beside the segmentations")
    p.add_argument("--continue_prediction", action="store_true", help="keep what is already there")
    p.add_argument("-step_size", type=float, default=0.5, help="from tile to tile, as a share of the patch")
    p.add_argument("--disable_tta", action="store_true", help="no mirrored passes: faster, less accurate")
    # nnU-Net's own defaults; `main` says when a variable is no number
    npp, nps = (int(given) if (given := os.environ.get(name, "")).isdigit() else 3 for name in ("nnUNet_npp", "nnUNet_nps"))
    p.add_argument("-npp", type=int, default=npp, help="processes for preprocessing; 0, with -nps 0: all in one process")
    p.add_argument("-nps", type=int, default=nps, help="processes for resampling and export")
    p.add_argument("-num_parts", type=int, default=1, help="number of calls that share the cases")
    p.add_argument("-part_id", type=int, default=0, help="number of this call, from 0")
    p.add_argument("--not_on_device", action="store_true", help="keep image and results in the CPU's memory")
    p.add_argument("--disable_progress_bar", action="store_true", help="no progress bar")
    fill = p.add_argument_group("for stock nnUNetv2_predict")
    fill.add_argument(
        "--fill_missing_only",
        action="store_true",
        help="predict nothing, and need no model: write the images to -o, with zeros for series that cases lack, or hold a copy "
        "in place of",
    )
    fill.add_argument("--copy", action="store_true", help="copy images that are there instead of linking them")
    fill.add_argument("--keep_copies", action="store_true", help="do not take copies of another series for missing series")
    fill.add_argument("--overwrite", action="store_true", help="replace the folder -o")

    p = add(
        "classify",
        "Probabilities of the classes, from images and masks; with maps of what drove them, series by series.",
        "nnunet_csm classify -d 21 -f 0 1 2 3 4 -i images -m masks -o predictions.csv --maps",
    )
    p.add_argument("-i", required=True, help="folder with CASE_0000.nii.gz, CASE_0001.nii.gz ..., as far as a case has them")
    p.add_argument("-m", required=True, help="folder with CASE.nii.gz: masks, such as nnunet_csm predict writes")
    p.add_argument("-o", required=True, help="CSV to write; a JSON beside it tells checkpoints, hashes and software")
    _add_model(p, CLASSIFIER)
    p.add_argument("--maps", action="store_true", help="also NIfTI and pictures of what drove each decision, by series")
    p.add_argument("--strict", action="store_true", help="a case without a usable mask is an error, not a line in a report")
    p.add_argument("--overwrite", action="store_true", help="replace what is there")

    p = add(
        "embed",
        "Features of raw images from a frozen encoder of any of our trainings: a vector a case, with --dense also maps.",
        "nnunet_csm embed -d 21 -f 0 -i images -o features.parquet",
    )
    p.add_argument("-i", required=True, help="folder with CASE_0000.nii.gz, CASE_0001.nii.gz ..., as far as a case has them")
    p.add_argument("-o", required=True, help="table to write: .parquet, .csv or .npz; a JSON beside it tells what it rests on")
    _add_model(p, PRETRAINER, required=False, folds="fold of the encoder; default: the one that is trained")
    p.add_argument("-encoder", metavar="PATH", help="a checkpoint or exported weights, instead of -d, -f, -tr, -c, -p and -chk")
    p.add_argument(
        "-series",
        nargs="+",
        metavar="NAME",
        help="of channels 0, 1, ... of the images, as the encoder names them; - leaves a channel out; default: the channels of "
        "the dataset it was trained on",
    )
    p.add_argument("-m", help="folder with CASE.nii.gz: masks to pool features over; default: over the images' foreground")
    p.add_argument("--dense", action="store_true", help="also NIfTI with the features of all places, a voxel a token")
    p.add_argument("--untrained", action="store_true", help="random weights of the same plans, for comparison")
    p.add_argument("-step_size", type=float, default=0.5, help="from tile to tile, as a share of the tile")
    p.add_argument("--overwrite", action="store_true", help="replace what is there")

    p = add(
        "impute",
        "Series that a case lacks, made up from those it has by a pretraining of ours, for experiments. Not for diagnosis.",
        "nnunet_csm impute -d 21 -f 0 -i images -o out -series FLAIR",
    )
    p.add_argument("-i", required=True, help="folder with CASE_0000.nii.gz, CASE_0001.nii.gz ..., as far as a case has them")
    p.add_argument("-o", required=True, help="folder to write: CASE_0000_imputed.nii.gz, a picture a case, imputed.json")
    _add_model(p, PRETRAINER, folds="fold of the pretraining; default: the one that is trained")
    p.add_argument(
        "-series",
        nargs="+",
        metavar="NAME",
        help="series to make up in every case, as if a case that has one had not; default: what each case lacks",
    )
    p.add_argument(
        "-draws",
        type=int,
        default=0,
        metavar="N",
        help="the mean of N draws of visible tokens, as in training, and CASE_NAME_disagreement.nii.gz; "
        "0: all tokens visible, once",
    )
    p.add_argument("--score", action="store_true", help="PSNR and SSIM where a case has what -series names, beside linear maps")
    p.add_argument("--for_prediction", action="store_true", help="also images_with_imputed, a folder of whole cases for predict")
    p.add_argument("--z_scores", action="store_true", help="write z-scores; needs no raw images of training cases")
    p.add_argument("-step_size", type=float, default=0.5, help="from tile to tile, as a share of the tile")
    p.add_argument("--overwrite", action="store_true", help="replace what is there")

    p = add(
        "probe",
        "What linear probes and nearest neighbours tell from embeddings: classes or numbers, patients whole, with intervals.",
        "nnunet_csm probe -i trained.parquet untrained.parquet -targets classification.csv -o probed",
    )
    p.add_argument("-i", nargs="+", required=True, help="tables of nnunet_csm embed; all others are compared with the first")
    p.add_argument("-targets", required=True, help="CSV with case, a class or a value, optionally patient and a group")
    p.add_argument("-o", required=True, help="folder to write: tables, predictions, a picture")
    p.add_argument("-class_column", help="column of the classes; default: class or label, where there is one")
    p.add_argument("-value_column", help="column of numbers; default: value, where there is one and no class")
    p.add_argument("-group", metavar="COLUMN", help="also score by what this column says, such as site")
    p.add_argument("-folds", type=int, default=5, help="parts of the patients, each predicted by a probe of the others")
    p.add_argument("-repeats", type=int, default=5, help="divisions into folds")
    p.add_argument("-seed", type=int, default=12345, help="seed of the divisions")
    p.add_argument("--overwrite", action="store_true", help="replace the folder -o")

    p = add(
        "evaluate",
        "Score segmentations by label and region, with overlay pictures; or a classifier's tables, with intervals over patients.",
        "nnunet_csm evaluate -d 21 -ref labelsTs -pred out -images imagesTs",
    )
    p.add_argument(
        "-pred", nargs="+", required=True, help="folder with segmentations; or the predictions.csv of each fold or repeat"
    )
    p.add_argument("-o", help="where tables and pictures go; default: the folder of the segmentations, for CSV files nowhere")
    masks = p.add_argument_group("a folder of segmentations, for which -d and -ref are needed")
    masks.add_argument("-d", help="dataset name or ID")
    masks.add_argument("-ref", help="folder with reference segmentations")
    masks.add_argument("-regions", nargs="+", metavar="NAME=1,2", help="regions to score, instead of those the label names imply")
    masks.add_argument("-np", type=int, default=1, help="processes; worth it for many large cases")
    masks.add_argument("-images", help="folder with the images, for overlay pictures")
    masks.add_argument("-overlays", type=int, default=5, help="number of overlay pictures, with -images")
    tables = p.add_argument_group("a classifier's CSV files, as in -pred fold_?/test/predictions.csv")
    tables.add_argument("-against", nargs="+", default=[], metavar="CSV", help="those of another training, in the same order")

    p = add(
        "export_weights",
        "A trained network as a folder that loads elsewhere: safetensors, JSON, a model card; with --onnx for other runtimes.",
        "nnunet_csm export_weights -d 21 -f 0 -o weights",
    )
    p.add_argument("-d", required=True, help="dataset name or ID")
    p.add_argument("-f", help="fold; needed where several are trained")
    p.add_argument("-tr", default=PRETRAINER, help=f"trainer; {FINETUNER} for a segmenter, {CLASSIFIER} for a classifier")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("-p", default=PLANS_NAME, help="plans")
    p.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint name")
    p.add_argument("-o", required=True, help="folder to write")
    p.add_argument(
        "--onnx", action="store_true", help="also model.onnx, of a segmenter or classifier, compared with the original"
    )
    p.add_argument(
        "--case_names", action="store_true", help="tell which cases were learned from, so that scores on them are warned of"
    )
    p.add_argument("--overwrite", action="store_true", help="replace the folder -o")

    p = add(
        "container",
        "A folder from which a container (Docker, Podman, Apptainer) with a trained model is built.",
        "nnunet_csm container -d 21 -f 0 -o container",
    )
    _add_model(p, FINETUNER, device=False)
    p.add_argument("-o", required=True, help="folder to write")
    p.add_argument(
        "-interface",
        default="plain",
        choices=("plain", "fomo26", "grand-challenge"),
        help="what the container is given and gives: folders named as nnU-Net's, or one case as these challenges do",
    )
    p.add_argument("--gpu", action="store_true", help="with CUDA, for a GPU; default: without, for CPUs")
    p.add_argument("--overwrite", action="store_true", help="replace the folder -o")

    p = add(
        "import_weights",
        "A pretrained encoder of others as such a folder, for finetune -encoder; all of its tensors, or an error.",
        "nnunet_csm import_weights -from bm_mae -i bmmae.pth -o bm_mae",
    )
    p.add_argument("-from", dest="origin", required=True, choices=("bm_mae",), help="whose it is")
    p.add_argument("-i", required=True, help="their file, of torch.save or safetensors")
    p.add_argument("-o", required=True, help="folder to write")
    p.add_argument("--overwrite", action="store_true", help="replace the folder -o")

    p = add(
        "study",
        "Run a table of methods, label shares and repeats; write it with intervals, as LaTeX and a page; go on where it was.",
        "nnunet_csm study table1 -d 1 -num_gpus 4 --dry_run",
    )
    p.add_argument(
        "file",
        nargs="?",
        help="a shipped study (`nnunet_csm study reconstruction -d 21`: what pretrainings rebuild, PSNR and SSIM), or the path "
        "of a JSON file; without it, the shipped ones are listed",
    )
    p.add_argument("-d", help="dataset name or ID")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("-p", default=STOCK_PLANS_NAME, help="nnU-Net's plans that all arms build on")
    p.add_argument("-o", help="folder of the study; default: study_NAME below the dataset's results")
    p.add_argument(
        "-preset", help="preset of all arms, instead of the study's: demo, cpu, S, B, L, few_labels, or the path of a preset file"
    )
    p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="device")
    p.add_argument("-num_gpus", type=int, default=1, help="GPUs of this machine")
    p.add_argument("-jobs", type=int, default=1, help="runs at once on each GPU; on a CPU, or on a cluster, in all")
    p.add_argument(
        "-slurm",
        nargs="*",
        metavar="NAME=VALUE",
        help="every run is a job of SLURM (pip install 'nnunet_csm[slurm]'), with these parameters of submitit: "
        "slurm_partition=gpu timeout_min=600 cpus_per_task=8 ...",
    )
    p.add_argument("--dry_run", "-dry_run", action="store_true", help="print the runs and what they will cost")
    p.add_argument("--report_only", "-report_only", action="store_true", help="tables and report of the runs that are done")

    p = add(
        "cite",
        "A methods section, BibTeX and the CLAIM checklist, from plans and checkpoints; [...] marks what authors must say.",
        "nnunet_csm cite -d 21 -o methods.md",
    )
    p.add_argument("-d", required=True, help="dataset name or ID")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("-p", default=PLANS_NAME, help="plans")
    p.add_argument("-tr", default=FINETUNER, help=f"trainer; {CLASSIFIER} for a classifier")
    p.add_argument("-o", help="Markdown file to write; default: print it")
    return parser


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


def _add_reading(p: argparse.ArgumentParser) -> None:
    """How raw images are read."""
    p.add_argument("-np", type=int, default=NUM_PROCESSES, help="processes")
    p.add_argument("--test_images", action="store_true", help="take the images in imagesTs, too; their labels are never read")
    p.add_argument("--strict", action="store_true", help="an unusable file is an error, not a line in a report")
    p.add_argument(
        "-series_alias", nargs="+", default=[], metavar="GIVEN=NAME", help="series names the alias table does not know"
    )


def _add_planning(p: argparse.ArgumentParser) -> None:
    p.add_argument("-d", nargs="+", required=True, help="dataset names or IDs")
    p.add_argument("-c", default="3d_fullres", help="configuration of nnU-Net's plans to build on")
    p.add_argument("-p", default=STOCK_PLANS_NAME, help="nnU-Net's plans to build on")
    p.add_argument(
        "-preset",
        default="auto",
        help="auto (B, S where memory asks for it, cpu where there is no CUDA device), demo, cpu, S, B, L, few_labels, paper "
        "(chosen by the series), for comparison "
        "mae3d, dino, pcrlv2, vox2vec, ae, vae, vqvae, maesil, nemesis, unime, bm_mae, a2fseg, or the path of a preset file",
    )
    p.add_argument("-gpu_memory_target", type=float, metavar="GB", help="GPU memory both trainings have to fit into")
    p.add_argument("--joint", action="store_true", help="one plan for all datasets, to pretrain on them together")
    p.add_argument(
        "-weights", nargs="+", type=float, help="with --joint, for each dataset: how often one of its cases is drawn; default: 1"
    )
    p.add_argument("-series", nargs="+", metavar="NAME", help="use these series only")
    p.add_argument("-overwrite_plans_name", help=f"name of the new plans; default: {PLANS_NAME}, with --joint {JOINT_PLANS_NAME}")
    p.add_argument("-overwrite_patch_size", nargs=3, type=int, metavar=("Z", "Y", "X"), help="patch size by hand")
    p.add_argument("-overwrite_token_size", nargs=3, type=int, metavar=("Z", "Y", "X"), help="token size by hand")
    p.add_argument(
        "-overwrite_target_spacing",
        nargs=3,
        type=float,
        metavar=("Z", "Y", "X"),
        help="spacing in mm of a joint plan, by hand; default: that of the first dataset",
    )
    _add_reading(p)


def _add_model(
    p: argparse.ArgumentParser,
    trainer: str,
    required: bool = True,
    folds: str = "folds whose predictions are averaged; default: those of 0 to 4 that are trained",
    device: bool = True,
) -> None:
    """A trained model, and where it is to run."""
    p.add_argument("-d", required=required, help="dataset name or ID")
    p.add_argument("-f", nargs="+", help=folds)
    p.add_argument("-tr", default=trainer, help="trainer")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("-p", default=PLANS_NAME, help="plans")
    p.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint name")
    if device:
        p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="device")


def _add_training(p: argparse.ArgumentParser, trainer: str) -> None:
    p.add_argument("-f", nargs="+", default=["0"], help="folds: 0 to 4, or all")
    p.add_argument("-tr", default=trainer, help="trainer")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("-p", help=f"plans; default: {PLANS_NAME}, for several datasets {JOINT_PLANS_NAME}")
    p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="device")
    p.add_argument("-num_gpus", type=int, default=1, help="GPUs of this machine; for several machines use torchrun or srun")
    p.add_argument("-accumulate", type=int, metavar="N", help="learn a batch in N parts, for less memory (nnUNet_csm_accumulate)")
    p.add_argument("--c", dest="flag_c", action="store_true", help="continue from the latest checkpoint")
    p.add_argument("--val", dest="flag_val", action="store_true", help="only run the final validation")
    p.add_argument("--npz", dest="flag_npz", action="store_true", help="save probabilities of the final validation")
