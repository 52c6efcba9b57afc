"""The progress bar of a training: loss, crops a second, time left."""

import time

from torch import Tensor
from tqdm import tqdm


class Progress:
    """One bar an epoch, with the time left for the whole run; silent where the output is no terminal."""

    def __init__(self, num_epochs: int, num_iterations: int, batch_size: int, shown: bool = True) -> None:
        self.num_epochs, self.num_iterations, self.batch_size = num_epochs, num_iterations, batch_size
        self.hidden = None if shown else True
        self.bar: tqdm | None = None
        self.run_started: float | None = None
        self.first_epoch = 0
        self.crops_per_second = float("nan")

    def start_epoch(self, epoch: int) -> None:
        if self.run_started is None:
            self.run_started, self.first_epoch = time.monotonic(), epoch
        self.epoch, self.epoch_started, self.shown = epoch, time.monotonic(), time.monotonic()
        self.bar = tqdm(
            total=self.num_iterations, desc=f"epoch {epoch + 1}/{self.num_epochs}", unit="it", leave=False, disable=self.hidden
        )

    def step(self, loss: Tensor | float) -> None:
        """Count one iteration. Reading the loss waits for the GPU, so it is read twice a second at most."""
        assert self.bar is not None
        self.bar.update()
        if not self.bar.disable and time.monotonic() - self.shown > 0.5:
            self.shown = time.monotonic()
            rate = self.bar.n * self.batch_size / (self.shown - self.epoch_started)
            self.bar.set_postfix_str(
                f"loss {float(loss):.4f}, {rate:.1f} crops/s, {self.left(self.bar.n / self.num_iterations)} left"
            )

    def end_epoch(self) -> None:
        """Close the bar; `crops_per_second` is that of this epoch's training iterations from here on."""
        assert self.bar is not None
        self.bar.close()
        self.crops_per_second = self.num_iterations * self.batch_size / (time.monotonic() - self.epoch_started)

    def left(self, share_of_epoch: float) -> str:
        """Time until the last epoch ends, from the mean pace of this process, validation included."""
        assert self.run_started is not None
        done = self.epoch - self.first_epoch + share_of_epoch
        seconds = (time.monotonic() - self.run_started) / max(done, 1e-6) * (self.num_epochs - self.epoch - share_of_epoch)
        hours, rest = divmod(round(seconds), 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
