"""The finished run in the folder of a fold: it stays, and can be used, until a fresh run has a checkpoint to put in its place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nnunet_csm.errors import UserError
from nnunet_csm.files import whole, write_text

# what nnU-Net writes beside the folds when a training starts, and prediction reads
DESCRIPTIONS = ("plans.json", "dataset.json", "dataset_fingerprint.json")


class EarlierRun:
    """What is left of the run before, from the start of a fresh one to its first checkpoint.

    In between, a file says that the checkpoints that are here are not those of the last run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.marker = folder, folder / "begun_afresh.txt"
        self.described: dict[Path, bytes] = {}

    def refuse_to_continue(self) -> None:
        """Raise `UserError` when going on would mean the run before the last one."""
        if self.marker.is_file():
            raise UserError(
                f"{self.marker}: a run that was begun afresh ended before its first checkpoint, and --c would go on from the "
                f"run before it; begin again without --c, or move this file away to go on from the earlier checkpoints"
            )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While nnU-Net starts a training: what it overwrites is put back, for as long as the earlier run is there."""
        files = [self.folder.parent / name for name in DESCRIPTIONS]
        earlier = {file: file.read_bytes() for file in files if file.is_file()}
        try:
            yield
        finally:
            self.described = {file: file.read_bytes() for file in earlier}
            _write(earlier)
        if any(self.folder.glob("checkpoint_*.pth")):
            write_text(self.marker, "A run was begun afresh and has no checkpoint yet; those here are of the run before.\n")

    def make_way(self) -> None:
        """The fresh run has a checkpoint."""
        _write(self.described)
        self.marker.unlink(missing_ok=True)


def _write(contents: Mapping[Path, bytes]) -> None:
    for file, content in contents.items():
        with whole(file) as temporary:
            temporary.write_bytes(content)
