"""Where the encoder that fine-tuning starts from lies."""

from pathlib import Path

from nnunet_csm.errors import UserError

ENCODER_VARIABLE = "nnUNet_csm_encoder"
PRETRAINER = "nnUNetTrainerCSMPretrain"


def find_encoder(wanted: str, output_folder: Path, trainer: str, owner: str, fold: int | str) -> Path:
    """The checkpoint that fine-tuning starts from.

    Args:
        wanted: auto (that of the same fold), all (that of fold all), or a path.
        output_folder: where fine-tuning of these plans writes, above the fold.
        trainer: the one that fine-tunes.
        owner: the dataset that the pretraining belongs to, by joint plans another one than that of `output_folder`.
        fold: the fold being fine-tuned.

    Raises:
        UserError: there is none; the message offers what there is.
    """
    pretraining = output_folder.parent.with_name(owner) / output_folder.name.replace(trainer, PRETRAINER, 1)
    if wanted not in ("auto", "all"):
        if not Path(wanted).is_file():
            raise UserError(f"{wanted}: no such checkpoint; {ENCODER_VARIABLE} takes auto, all, scratch or a path")
        return Path(wanted)
    folder = pretraining / f"fold_{fold if wanted == 'auto' else 'all'}"
    path = folder / "checkpoint_final.pth"
    if path.is_file():
        return path
    remedies = [f"pretrain with `nnUNetv2_train ... {folder.name.removeprefix('fold_')} -tr {PRETRAINER}`"]
    if (folder / "checkpoint_latest.pth").is_file():
        remedies = [f"finish the pretraining that was begun there with `nnUNetv2_train ... -tr {PRETRAINER} --c`"]
    best = folder / "checkpoint_best.pth"
    if best.is_file():
        remedies.append(f"use the weights of its lowest validation loss so far with {ENCODER_VARIABLE}={best}")
    if (pretraining / "fold_all" / "checkpoint_final.pth").is_file():
        remedies.append(f"use that of fold all, which saw this fold's validation images, with {ENCODER_VARIABLE}=all")
    remedies.append(f"train from scratch with {ENCODER_VARIABLE}=scratch")
    raise UserError(f"{path}: no pretrained encoder; {'; or '.join(remedies)}")
