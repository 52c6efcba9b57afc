"""`nnunet_csm import_weights`: pretrained encoders of others as folders of ours."""

from pathlib import Path

from nnunet_csm import checkpoint, weights_folder
from nnunet_csm.files import whole_folder, write_text
from nnunet_csm.model.transfer import read_encoder
from nnunet_csm.plans import NETWORK_CLASS
from nnunet_csm.sharing import bm_mae
from nnunet_csm.sharing.card import card
from nnunet_csm.weights_folder import CARD

# by name: what their licence allows, as far as it is known here
KNOWN = {
    "bm_mae": "BM-MAE: the licence of its code is CC BY-NC 4.0 in the copy that was read, which forbids commercial use; that of "
    "the weights stands where they are from",
}


def import_weights(origin: str, path: Path, output: Path, overwrite: bool = False) -> list[str]:
    """Write an encoder of others as a folder that `finetune -encoder` and `load_encoder` take, whole or not at all.

    Args:
        origin: one of `KNOWN`.
        path: their file: of `torch.save`, or safetensors.
        output: the folder.
        overwrite: replace it.

    Returns:
        What was taken over, in words.

    Raises:
        UserError: not such a file; nothing is taken over in part.
    """
    remedy = f"expected a dictionary of tensors of {origin}"
    theirs = weights_folder.load_tensors(path, remedy) if path.suffix == ".safetensors" else checkpoint.load_tensors(path, remedy)
    checkpoint.check_weights(theirs, str(path), remedy)
    brought = bm_mae.bring_in(theirs, str(path))
    kwargs, token = brought.arch_kwargs, brought.arch_kwargs["token_size"]
    entry = {
        "spacing": list(bm_mae.SPACING),
        "patch_size": [places * edge for places, edge in zip(brought.grid, token, strict=True)],
        "normalization_schemes": ["ZScoreNormalization"] * len(kwargs["series"]),
        "use_mask_for_norm": [True] * len(kwargs["series"]),
        "architecture": {"network_class_name": NETWORK_CLASS, "arch_kwargs": kwargs, "_kw_requires_import": []},
    }
    plans = {"dataset_name": origin, "plans_name": origin, "configurations": {"3d_fullres": entry}}
    dataset_json = {
        "channel_names": {str(number): name for number, name in enumerate(kwargs["series"])},
        "description": bm_mae.DATA,
    }
    init_args = {"plans": plans, "configuration": "3d_fullres", "fold": "all", "dataset_json": dataset_json}
    saved = {"init_args": init_args, "trainer_name": origin, "series": kwargs["series"]}
    weights = {f"encoder.{name}": tensor for name, tensor in brought.weights.items()}
    with whole_folder(output, overwrite) as folder:
        weights_folder.write(folder, "encoder", origin, saved, weights)
        # as every later reader does
        read_encoder(str(folder))
        described = weights_folder.describe(folder)
        write_text(folder / CARD, card(described, sum(tensor.numel() for tensor in weights.values()), licence=KNOWN[origin]))
    words = {"tensors": len(theirs), "taken over": len(theirs) - len(brought.left_out), "left out": len(brought.left_out)}
    return [
        f"{output}: {', '.join(f'{number} {what}' for what, number in words.items())} (its class token, its decoder)",
        f"series {', '.join(kwargs['series'])}; {kwargs['width']} wide, {kwargs['depth']} deep, tokens of {token[0]} cubed",
        KNOWN[origin],
    ]
