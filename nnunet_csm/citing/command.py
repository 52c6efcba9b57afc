"""`nnunet_csm cite`: what a paper has to say of a run, as Markdown; [...] marks what nobody but its authors can know."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files

import pandas as pd

from nnunet_csm import __version__, nnunet
from nnunet_csm.citing.found import CLASSIFIER, Run, Stage
from nnunet_csm.plans import Optimization, Schedule
from nnunet_csm.schema import Size

FOLDER = files("nnunet_csm.citing")
NAMES = {"csm": "cross-series masking", "vit": "a ViT", "joint_vit": "a ViT whose tokens hold all series"}
# what a pretext, a preset, a decoder or a fusion is to be cited by, where that is a paper of somebody's
PRETEXT_PAPERS = {name: (name,) for name in ("csm", "mae3d", "dino", "pcrlv2", "vox2vec", "maesil", "vae", "vqvae")}
PRESET_PAPERS = {"nemesis": ("nemesis",), "unime": ("unime",), "bm_mae": ("bm_mae",)}
DECODER_PAPERS = {"unetr": ("unetr",), "light": ("primus",), "adaptive": ("a2fseg",)}
FUSION_PAPERS = {"adaptive": ("a2fseg",), "deformable": ("deformable",)}
# of fine-tuning, said where they are not 0
KNOBS = ("frozen_share", "stem_closed_share", "ema", "series_dropout", "masked_loss_weight")
CLAIM_IS = "CLAIM 2020 [@claim]; its update of 2024 numbers some items differently"


def cite(dataset: str, plans_name: str, configuration: str, trainer: str) -> str:
    """Methods section, references and checklist of a run, as Markdown.

    Raises:
        UserError: no such dataset, no plans of that name, or a checkpoint that is none.
    """
    run = Run(nnunet.dataset_name(dataset), plans_name, configuration, trainer)
    methods, keys = methods_of(run), papers_of(run)
    rows = [(number, asks, answers_of(run).get(int(number), "[authors]")) for number, asks in claim_items().items()]
    table = pd.DataFrame(rows, columns=["item", "about", "answer"]).to_markdown(index=False)
    return "\n".join(
        [
            f"# {run.dataset}, {run.plans_name}",
            "\n## Methods\n",
            "\n\n".join(methods),
            "\n## References\n",
            f"```bibtex\n{bibtex([*keys, 'claim'])}\n```",
            "\n## Checklist\n",
            f"{CLAIM_IS}. What stands in brackets is for the authors to say.\n",
            f"{table}\n",
        ]
    )


# --- methods -----------------------------------------------------------------------------------------------------------------


def methods_of(run: Run) -> list[str]:
    """Paragraphs of a methods section."""
    return [
        software_said(run),
        data_said(run),
        network_said(run),
        pretraining_said(run),
        finetuning_said(run),
        prediction_said(run),
    ]


def software_said(run: Run) -> str:
    versions = {name: run.software.get(name, "[version]") for name in ("nnunet_csm", "nnunetv2", "torch", "python")}
    return (
        f"We used nnU-Net (nnunetv2 {versions['nnunetv2']}) [@nnunet] with nnunet_csm {versions['nnunet_csm']} [@nnunet_csm], "
        f"PyTorch {versions['torch']} and Python {versions['python']}."
    )


def data_said(run: Run) -> str:
    series = run.settings.architecture.series
    cases = f"{len(run.cases)}" if run.cases else "[number]"
    patients = "[number]" if run.num_patients is None else f"{run.num_patients}"
    lacking = "[number]" if run.num_incomplete is None else f"{run.num_incomplete}"
    test = f", and {run.num_test} in imagesTs," if run.num_test else ""
    spacing = run.stock.get("spacing")
    return (
        f"The data are {cases} labelled cases of {patients} patients [a case of unknown patient counts as one: check]{test} from "
        f"[source, dates, scanners, inclusion and exclusion, ethics], with the series {', '.join(series)}; {lacking} lack one or "
        f"more of them, which count as absent. Labels were drawn by [who, how]. nnU-Net's preprocessing ({run.configuration}) "
        f"resampled all series of a case to {' x '.join(f'{one:.3g}' for one in spacing) if spacing else '[spacing]'} mm and "
        f"normalised each ({', '.join(dict.fromkeys(run.stock.get('normalization_schemes', ['[how]'])))})."
    )


def network_said(run: Run) -> str:
    architecture, csm = run.settings.architecture, run.settings.csm
    kind, decoder = architecture.encoder.kind, architecture.decoder
    heads = f", {architecture.num_heads} heads" if "vit" in kind else ""
    cited = "".join(f" [@{key}]" for key in DECODER_PAPERS.get(decoder, ()))
    head = "a pooling and a linear layer" if run.trainer == CLASSIFIER else f"the decoder {decoder}{cited}"
    return (
        f"The encoder ({NAMES.get(kind, kind)}, {architecture.width} wide, {architecture.depth} deep{heads}; preset "
        f"{csm.preset}, plans {run.plans_name}) takes tokens of {sizes(architecture.token_size)} voxels of every series; "
        f"features of the series that a case has are fused by {architecture.fusion_settings.name} and go to {head}. "
        f"Sizes are in voxels, (z, y, x)."
    )


def pretraining_said(run: Run) -> str:
    csm, trained = run.settings.csm, run.pretraining
    name = csm.pretext["name"]
    if run.from_scratch or name == "none":
        return "Networks were trained from scratch."
    cited = "".join(f" [@{key}]" for key in pretext_papers(run))
    masking = csm.pretext.get("masking", {})
    hidden = f", {masking['mask_ratio']:.1%} of the tokens of a shown series hidden" if "mask_ratio" in masking else ""
    numbers = sorted({len(saved.get("training_cases", ())) for saved in trained.saved.values()})
    cases = " or ".join(map(str, numbers)) or "[number]"
    own = (run.dataset, "imagesTr")
    others = [f"{one.dataset} ({one.subset})" for one in csm.sources if (one.dataset, one.subset) != own]
    among = f" (with {' and '.join(others)})" if others else ""
    return (
        f"The encoder was pretrained without labels by {NAMES.get(name, name)}{cited}{hidden}, {folds_said(trained)}, on the "
        f"images of {cases} training cases{among}, for {length_said(csm.pretraining, trained)} of "
        f"{sizes(csm.pretraining_patch_size)} voxels; {optimizer_said(csm.pretraining)}; seed {csm.seed}. {spent_said(trained)}"
    )


def finetuning_said(run: Run) -> str:
    trained, csm = run.finetuning, run.settings.csm
    patch, loss, knobs = run.settings.patch_size, "nnU-Net's loss (Dice and cross-entropy) and augmentation", ""
    if run.trainer == CLASSIFIER:
        patch = csm.classification.patch_size
        loss = "a smooth L1 loss on standardised targets" if predicts_numbers(run) else "cross-entropy"
    else:
        changed = {name: getattr(csm.finetuning, name) for name in KNOBS}
        knobs = "".join(f", {name} {value:g}" for name, value in changed.items() if value)
    return (
        f"The network was then trained on labelled cases with {loss}, {folds_said(trained)}, for "
        f"{length_said(run.schedule, trained)} of {sizes(patch)} voxels; {optimizer_said(run.schedule)}{knobs}; "
        f"seed {csm.seed}. {spent_said(trained)}"
    )


def predicts_numbers(run: Run) -> bool:
    """Whether it is known that a classifier has learned numbers."""
    return any(one.get("target") == "value" for one in run.finetuning.saved.values())


def prediction_said(run: Run) -> str:
    if run.trainer == CLASSIFIER:
        return f"{'Numbers' if predicts_numbers(run) else 'Probabilities'} are the mean over folds [which were used]."
    flips = "with" if run.settings.csm.finetuning.mirroring else "without"
    return (
        f"Predictions are nnU-Net's, by a sliding window {flips} mirrored passes, averaged over [which folds]; series that a "
        f"case lacks were left out."
    )


def sizes(size: Size) -> str:
    return " x ".join(map(str, size))


def folds_said(stage: Stage) -> str:
    if not stage.folds:
        return "[which folds: no training is finished]"
    return (
        "on all cases (fold all)" if stage.folds == ["all"] else f"in fold{'s' * (len(stage.folds) > 1)} {', '.join(stage.folds)}"
    )


def length_said(schedule: Schedule, stage: Stage) -> str:
    """Steps and crops, of what was trained, or of what is planned."""
    epochs = max(stage.epochs, default=schedule.num_epochs)
    steps = epochs * schedule.iterations_per_epoch
    return f"{steps:,} steps of {schedule.batch_size} ({steps * schedule.batch_size:,} patches)"


def optimizer_said(schedule: Optimization) -> str:
    return (
        f"AdamW (betas {schedule.betas[0]:g} and {schedule.betas[1]:g}, weight decay {schedule.weight_decay:g}), learning rate "
        f"{schedule.learning_rate:g} after a linear warm-up over {schedule.warmup:.0%} of the steps, then a cosine to 0"
    )


def spent_said(stage: Stage) -> str:
    spent = (
        "[hours]" if math.isnan(stage.hours) else f"{stage.hours:.3g} h" if stage.hours >= 1 else f"{stage.hours * 60:.2g} min"
    )
    return f"It took {spent} a fold on {' and '.join(stage.devices) or '[device]'} [how many]."


# --- references --------------------------------------------------------------------------------------------------------------


def pretext_papers(run: Run) -> list[str]:
    csm = run.settings.csm
    return [*PRETEXT_PAPERS.get(csm.pretext["name"], ()), *PRESET_PAPERS.get(csm.preset, ())]


def papers_of(run: Run) -> list[str]:
    """Keys of what the run rests on, each once."""
    architecture = run.settings.architecture
    pretexts = [] if run.from_scratch else pretext_papers(run)
    decoders = () if run.trainer == CLASSIFIER else DECODER_PAPERS.get(architecture.decoder, ())
    encoders = ("vit",) if "vit" in architecture.encoder.kind else ()
    fusions = FUSION_PAPERS.get(architecture.fusion_settings.name, ())
    return list(dict.fromkeys(["nnunet_csm", "nnunet", *pretexts, *encoders, *decoders, *fusions]))


def bibtex(keys: Iterable[str]) -> str:
    """The entries of these keys."""
    entries = references()
    return "\n\n".join(entries[key] for key in keys)


def references() -> dict[str, str]:
    """BibTeX entries by key; ours with the version that is installed."""
    text = (FOLDER / "references.bib").read_text(encoding="utf-8").replace("{VERSION}", f"{{{__version__}}}")
    return {entry.split("{")[1].split(",")[0]: entry.strip() for entry in text.split("\n\n") if entry.strip()}


# --- checklist ---------------------------------------------------------------------------------------------------------------


def claim_items() -> dict[str, str]:
    """Numbers of the checklist's items, and what each is about, in words of our own."""
    items: dict[str, str] = json.loads((FOLDER / "claim.json").read_text(encoding="utf-8"))
    return items


def answers_of(run: Run) -> dict[int, str]:
    """What the run tells of items, by number."""
    architecture, csm = run.settings.architecture, run.settings.csm
    used, channels = architecture.series, run.stock.get("normalization_schemes", ())
    incomplete = "[number of]" if run.num_incomplete is None else str(run.num_incomplete)
    scratch = run.from_scratch or csm.pretext["name"] == "none"
    initial = (
        "as drawn, from the seed"
        if scratch
        else f"encoder from pretraining ({csm.pretext['name']}) on {where_said(run)}; the rest as drawn"
    )
    dropout = csm.finetuning.series_dropout
    return {
        1: f"deep learning ({architecture.encoder.kind} in nnU-Net){'' if scratch else ', self-supervised pretraining'}; [title]",
        9: "nnU-Net's: see Methods; [anything before it, as registration or defacing]",
        10: f"{len(used)} of {len(channels) or '[number]'} series: {', '.join(used)}; [cases that were left out]",
        13: f"{incomplete} cases lack series: zeros in their place, never attended to, never in a loss"
        + (f"; {dropout:.0%} of the training samples lose further series" if dropout else "")
        + "; [missing labels and clinical data]",
        19: f"{len(run.cases) or '[number]'} labelled cases; [how that number came about]",
        20: partitions_said(run.splits),
        21: "patients, where `convert` or classification.csv names them, else cases; [sites]",
        22: "see Methods; the plans hold every size; [figure]",
        23: ", ".join(f"{name} {number}" for name, number in run.software.items()),
        24: f"{initial}; seed {csm.seed}",
        25: f"see Methods; networks trained: {len(run.finetuning.folds)}; [searched settings]",
        26: "the last weights (checkpoint_final.pth)"
        + (", averaged over steps" if csm.finetuning.ema else "")
        + "; [if another was used]",
        27: f"mean over folds, {len(run.finetuning.folds)} trained; [which were used]",
        28: "`nnunet_csm evaluate`: Dice by label and region; of classes AUC, of numbers MAE and others; [which is primary]",
        29: "`study`, and `evaluate` for classes and numbers, give bootstrap intervals over patients; [which were used]",
        31: "`classify --maps` (integrated gradients by series)" if run.trainer == CLASSIFIER else "[authors]",
    }


def where_said(run: Run) -> str:
    return ", ".join(dict.fromkeys(source.dataset for source in run.settings.csm.sources))


def partitions_said(splits: Sequence[Mapping[str, Sequence[str]]]) -> str:
    if not splits:
        return "[no splits file found]"
    counted = dict.fromkeys(", ".join(f"{len(cases)} {side}" for side, cases in split.items()) for split in splits)
    made = "[who made them: nnU-Net at random, `split`, the data's authors; test set]"
    return f"{len(splits)} splits of {' / '.join(counted)} cases; {made}"
