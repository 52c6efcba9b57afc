"""`nnunet_csm evaluate` of a classifier: scores of several folds or repeats, alone or beside another training's."""

import csv
from collections.abc import Sequence
from pathlib import Path

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.files import write_text
from nnunet_csm.heads.base import HEADS, Head, Scores, head_class


def evaluate_runs(predictions: Sequence[Path], against: Sequence[Path], output: Path | None) -> None:
    """Print metrics over all runs with intervals over patients; with `against`, both and their paired differences.

    Writes, with `output`, metrics.json, metrics.csv, metrics.md and curves.png.

    Raises:
        UserError: files that cannot be read or compared.
    """
    head = head_of_predictions(predictions[0])
    runs = head.read(predictions)
    found: Scores = head.evaluate(runs)
    text = found.to_markdown()
    if against:
        others, sample = head.read(against), ["run", "case", "mask_label", head.target]
        if list(others) != list(runs) or not others[sample].equals(runs[sample]):
            raise UserError(
                f"{against[0]} ...: these {len(against)} runs do not predict the samples of {predictions[0]} ... in their order; "
                f"give the same folds of both trainings, in the same order"
            )
        compared = head.compare(others, runs)
        found, text = compared, compared.to_markdown(("against", "predictions"))
    print(f"{len(predictions)} runs; {text}")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in (("metrics.md", text + "\n"), ("metrics.csv", found.table().to_csv(index=False))):
            write_text(output / name, content)
        head.draw(output / "curves.png", runs, f"{len(predictions)} runs")
        nnunet.save_json(found.to_dict(), output / "metrics.json")
        print(f"written to {output}")


def head_of_predictions(path: Path) -> type[Head]:
    """What a `predictions.csv` is of, by its columns; classes, whose reader says what is wrong, where that cannot be told."""
    header: list[str] = []
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="") as stream:
            header = next(csv.reader(stream), [])
    return head_class(next((target for target in HEADS if target in header), "class"))
