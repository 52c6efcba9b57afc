"""What trained networks say of images."""

import argparse
import os
from pathlib import Path

from nnunet_csm import nnunet
from nnunet_csm.cli.flags import CLASSIFIER, FINETUNER, PRETRAINER, Commands, add_model, model_flags
from nnunet_csm.errors import UserError


def declare(commands: Commands) -> None:
    p = commands.add(
        "predict",
        "Segment images as nnUNetv2_predict does, in less time, with a check of the inputs; a case may lack series.",
        "nnunet_csm predict -d 21 -f 0 -i in -o out",
        predict,
    )
    p.add_argument(
        "-i", required=True, help="input folder, with CASE_0000.nii.gz, CASE_0001.nii.gz ..., as far as they are there"
    )
    p.add_argument("-o", required=True, help="output folder")
    add_model(p, FINETUNER)
    p.add_argument("--save_probabilities", action="store_true", help="write probabilities beside the segmentations")
    p.add_argument(
        "--uncertainty",
        action="store_true",
        help="also OUTPUT/uncertainty: an entropy map of each case, and volumes.csv with the volumes of all folds and mirrored "
        "passes; one process, -npp and -nps count for nothing",
    )
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

    p = commands.add(
        "classify",
        "Probabilities of classes, or numbers, from images and masks; with maps of what drove them, series by series.",
        "nnunet_csm classify -d 21 -f 0 1 2 3 4 -i images -m masks -o predictions.csv --maps",
        classify,
    )
    p.add_argument("-i", required=True, help="folder with CASE_0000.nii.gz, CASE_0001.nii.gz ..., as far as a case has them")
    p.add_argument("-m", required=True, help="folder with CASE.nii.gz: masks, such as nnunet_csm predict writes")
    p.add_argument("-o", required=True, help="CSV to write; a JSON beside it tells checkpoints, hashes and software")
    add_model(p, CLASSIFIER)
    p.add_argument("--maps", action="store_true", help="also NIfTI and pictures of what drove each decision, by series")
    p.add_argument(
        "--calibrated",
        action="store_true",
        help="probabilities at a temperature that the folds' validation predictions ask for; says what calibration was and is",
    )
    p.add_argument("--strict", action="store_true", help="a case without a usable mask is an error, not a line in a report")
    p.add_argument("--overwrite", action="store_true", help="replace what is there")

    p = commands.add(
        "embed",
        "Features of raw images from a frozen encoder of any of our trainings: a vector a case, with --dense also maps.",
        "nnunet_csm embed -d 21 -f 0 -i images -o features.parquet",
        embed,
    )
    p.add_argument("-i", required=True, help="folder with CASE_0000.nii.gz, CASE_0001.nii.gz ..., as far as a case has them")
    p.add_argument("-o", required=True, help="table to write: .parquet, .csv or .npz; a JSON beside it tells what it rests on")
    add_model(p, PRETRAINER, required=False, folds="fold of the encoder; default: the one that is trained")
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

    p = commands.add(
        "impute",
        "Series that a case lacks, made up from those it has by a pretraining of ours, for experiments. Not for diagnosis.",
        "nnunet_csm impute -d 21 -f 0 -i images -o out -series FLAIR",
        impute,
    )
    p.add_argument("-i", required=True, help="folder with CASE_0000.nii.gz, CASE_0001.nii.gz ..., as far as a case has them")
    p.add_argument("-o", required=True, help="folder to write: CASE_0000_imputed.nii.gz, a picture a case, imputed.json")
    add_model(p, PRETRAINER, folds="fold of the pretraining; default: the one that is trained")
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


def predict(args: argparse.Namespace) -> int:
    if args.fill_missing_only:
        return _fill_missing(args)
    if given := [f"--{flag}" for flag in ("copy", "keep_copies", "overwrite") if getattr(args, flag)]:
        raise UserError(f"{', '.join(given)}: only with --fill_missing_only; predict replaces what is in -o by itself")
    from nnunet_csm.inference.segmentation import PredictRequest
    from nnunet_csm.inference.segmentation import predict as run_segmenter

    run_segmenter(
        PredictRequest(
            **model_flags(args),
            images=Path(args.i),
            output=Path(args.o),
            step_size=args.step_size,
            mirroring=not args.disable_tta,
            save_probabilities=args.save_probabilities,
            uncertainty=args.uncertainty,
            continue_prediction=args.continue_prediction,
            num_preprocessing=args.npp,
            num_export=args.nps,
            num_parts=args.num_parts,
            part_id=args.part_id,
            on_device=not args.not_on_device,
            progress_bar=not args.disable_progress_bar,
        )
    )
    return 0


def _fill_missing(args: argparse.Namespace) -> int:
    """Complete images for stock prediction."""
    from nnunet_csm.inference.missing import fill_missing
    from nnunet_csm.raw.check import load_dataset_json

    name = nnunet.dataset_name(args.d)
    folders = [nnunet.folder(variable) / name for variable in ("nnUNet_preprocessed", "nnUNet_raw")]
    described = load_dataset_json(next((f for f in folders if os.path.lexists(f / "dataset.json")), folders[-1]))
    names, ending = nnunet.channel_names(described), described["file_ending"]
    for line in fill_missing(Path(args.i), Path(args.o), names, ending, not args.keep_copies, args.copy, args.overwrite):
        print(line)
    return 0


def classify(args: argparse.Namespace) -> int:
    from nnunet_csm.inference.classification import ClassifyRequest
    from nnunet_csm.inference.classification import classify as run_classifier

    request = ClassifyRequest(
        **model_flags(args),
        images=Path(args.i),
        masks=Path(args.m),
        output=Path(args.o),
        maps=args.maps,
        calibrated=args.calibrated,
        strict=args.strict,
        overwrite=args.overwrite,
    )
    for line in run_classifier(request):
        print(line)
    return 0


def embed(args: argparse.Namespace) -> int:
    from nnunet_csm.inference.embedding import EmbedRequest
    from nnunet_csm.inference.embedding import embed as run_encoder

    request = EmbedRequest(
        **model_flags(args),
        images=Path(args.i),
        output=Path(args.o),
        encoder=Path(args.encoder) if args.encoder else None,
        series=tuple(args.series) if args.series else None,
        masks=Path(args.m) if args.m else None,
        dense=args.dense,
        untrained=args.untrained,
        step_size=args.step_size,
        overwrite=args.overwrite,
    )
    for line in run_encoder(request):
        print(line)
    return 0


def impute(args: argparse.Namespace) -> int:
    from nnunet_csm.inference.imputation import ImputeRequest
    from nnunet_csm.inference.imputation import impute as run_imputation

    request = ImputeRequest(
        **model_flags(args),
        images=Path(args.i),
        output=Path(args.o),
        series=tuple(args.series) if args.series else None,
        num_draws=args.draws,
        z_scores=args.z_scores,
        score=args.score,
        for_prediction=args.for_prediction,
        step_size=args.step_size,
        overwrite=args.overwrite,
    )
    for line in run_imputation(request):
        print(line)
    return 0
