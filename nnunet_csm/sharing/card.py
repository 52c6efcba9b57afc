"""The model card of exported weights: what they are, of what, how they load, what they are for."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from nnunet_csm import nnunet
from nnunet_csm.heads.base import head_in
from nnunet_csm.weights_folder import CONFIG, Description

# columns of probe.csv that say something to somebody who has not read the docs
OF_PROBE = {
    "hidden_part": "error on hidden voxels of series that are visible elsewhere (variance of a voxel: 1)",
    "hidden_part_linear": "there, of the best linear maps",
    "hidden_whole": "error on series that are hidden whole",
    "hidden_whole_linear": "on these, of the best linear maps",
    "lesion_precision": "lesions found in frozen features: average precision",
    "lesion_precision_untrained": "the same, of the untrained encoder",
}
LOAD_ENCODER = """encoder = nnunet_csm.load_encoder("THIS_FOLDER")  # or the name of this repository
features = encoder.features({{{images}}})  # volumes (z, y, x) at {spacing} mm, any subset of the series"""
LOAD_NETWORK = """network = nnunet_csm.load_network("THIS_FOLDER")  # or the name of this repository
logits = network(patches)  # (batch, channel, z, y, x), {patch} voxels at {spacing} mm, a missing series all zero"""
LOADING = """```python
import nnunet_csm
{lines}
```

Another segmenter or classifier starts from its encoder with `nnunet_csm finetune -d ID -encoder THIS_FOLDER`, whose plans have
tokens of {token} voxels and the same encoder. Nothing in the folder is executed: `model.safetensors` holds tensors, `config.json`
text."""
# what is the same for all
USE = """For research: features, a start for networks of one's own, comparisons, each judged on data of one's own. Not a medical
device; not for diagnosis or treatment. It knows the scanners, patients and series of the data above, and no others."""
LICENCE = """**TO BE CHOSEN by whoever passes these weights on**, here and in `license:` above: what the data allow, and what
patients agreed to, decides. The software that reads them is Apache-2.0."""


def card(described: Description, num_weights: int, fold_folder: Path | None = None, licence: str = LICENCE) -> str:
    """The text of README.md.

    Args:
        described: the weights.
        num_weights: how many numbers there are.
        fold_folder: where the training that they are of left its figures, if it was one of ours.
        licence: what is known of it.
    """
    images, saved = described.images, described.checkpoint
    plans = saved["init_args"]["plans"]
    spacing, patch, token = (" x ".join(f"{n:g}" for n in images[name]) for name in ("spacing", "patch_size", "token_size"))
    figures = [] if fold_folder is None else list(figures_of(described, fold_folder))
    network = plans["configurations"][saved["init_args"]["configuration"]]["architecture"]["arch_kwargs"]
    facts = {
        "network": f"encoder {network['width']} wide and {network['depth']} deep; {num_weights:,} numbers in all",
        "learned by": f"{described.method}; {saved['trainer_name']}, fold {saved['init_args'].get('fold')}",
        "series": ", ".join(f"{name} (channel {channel})" for name, channel in images["channels"].items()),
        "spacing (z, y, x)": f"{spacing} mm",
        "patch and token": f"{patch} and {token} voxels",
        "intensities": ", ".join(dict.fromkeys(images["normalization_schemes"])) or "see config.json",
        "software": ", ".join(f"{name} {version}" for name, version in saved.get("software", {}).items()),
    }
    if "classes" in saved:
        facts["predicts"] = head_in(saved).known()
    elif described.kind == "segmenter":
        facts["labels"] = ", ".join(f"{name} {value}" for name, value in saved["init_args"]["dataset_json"]["labels"].items())
    if described.onnx:
        facts["model.onnx"] = f"opset {described.onnx['opset']}; inputs and outputs are in {CONFIG}, a missing series is all zero"
    given = ", ".join(f'"{name}": ...' for name in images["series"][:2])
    lines = (LOAD_ENCODER if described.kind == "encoder" else LOAD_NETWORK).format(images=given, spacing=spacing, patch=patch)
    sections = {
        "Loading": LOADING.format(lines=lines, token=token),
        "Data": data_of(described),
        "Figures": "\n\n".join(figures) or "None stood beside the weights.",
        "Use": USE,
        "Licence": licence,
    }
    head = "---\nlicense: other\nlibrary_name: nnunet_csm\ntags: [medical, mri, nnunet, 3d]\n---"
    title = f"# {described.kind.capitalize()} of {', '.join(images['series'])}"
    return "\n\n".join([head, title, _table(facts), *(f"## {name}\n\n{text}" for name, text in sections.items())]) + "\n"


def data_of(described: Description) -> str:
    """What the network was trained on, as far as it is known."""
    saved = described.checkpoint
    dataset_json, counts = saved["init_args"]["dataset_json"], saved.get("num_training_cases", {})
    lines = [f"- {dataset}: {number} training cases" for dataset, number in counts.items()]
    if not counts:
        number = dataset_json.get("numTraining")
        lines = [f"- {saved['init_args']['plans']['dataset_name']}" + (f": {number} cases" if number else "")]
    told = {name: dataset_json[name] for name in ("description", "reference", "licence") if name in dataset_json}
    return "\n".join([*lines, *(f"- {name} of the data: {text}" for name, text in told.items())])


def figures_of(described: Description, fold_folder: Path) -> Iterator[str]:
    """Tables of what the training left in its folder."""
    probe, summary = fold_folder / "probe.csv", fold_folder / "validation" / "summary.json"
    if probe.is_file():
        last = pd.read_csv(probe).iloc[-1]
        rows = {words: f"{last[name]:.3f}" for name, words in OF_PROBE.items() if name in last and pd.notna(last[name])}
        yield f"On held-out subjects, after {int(last['crops']):,} crops (`probe.csv`):\n\n{_table(rows)}"
    if not summary.is_file() or described.kind == "encoder":
        return
    content = nnunet.read_json(summary, "validate again, or move it away")
    where = f"On the validation cases of fold {described.checkpoint['init_args']['fold']} (`validation/summary.json`)"
    if described.kind == "classifier":
        metrics = content.get("metrics", {})
        rows = {name: shown_interval(metrics[name]) for name in head_in(described.checkpoint).titles if name in metrics}
        yield f"{where}, {content.get('num_patients', '?')} patients:\n\n{_table(rows)}"
        return
    names = {str(value): name for name, value in described.checkpoint["init_args"]["dataset_json"]["labels"].items()}
    labels = {names.get(label, label): values for label, values in content.get("mean", {}).items()}
    rows = {name: f"{values['Dice']:.3f}" for name, values in {**labels, "mean": content["foreground_mean"]}.items()}
    yield f"{where}, Dice:\n\n{_table(rows)}"


def shown_interval(metric: Mapping[str, float | None]) -> str:
    """A metric of a classifier's summary, with its interval where there is one."""
    value, low, high = (metric.get(name) for name in ("value", "low", "high"))
    if value is None:
        return "not defined"
    return f"{value:.3f}" + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value)])
