"""The progress of a training, as a bar or in lines: loss, crops a second, time left."""

import sys
import time

from torch import Tensor
from tqdm import tqdm

# between two lines: half of the time so far, and so many seconds at least and at most
PAUSES = (10.0, 600.0)


class Progress:
    """One bar an epoch, with the time left for the whole run; where the output is no terminal, a line now and then."""

    def __init__(self, num_epochs: int, num_iterations: int, batch_size: int, shown: bool = True) -> None:
        self.num_epochs, self.num_iterations, self.batch_size = num_epochs, num_iterations, batch_size
        self.hidden = None if shown else True
        self.in_lines, self.next_line = shown and not sys.stdout.isatty(), 0.0
        self.bar: tqdm | None = None
        self.run_started: float | None = None
        self.first_epoch = 0
        self.crops_per_second = float("nan")

    def start_epoch(self, epoch: int) -> None:
        if self.run_started is None:
            self.run_started, self.first_epoch = time.monotonic(), epoch
            if self.in_lines:
                first, total = epoch * self.num_iterations, self.num_epochs * self.num_iterations
                print(f"step {first:,} of {total:,}; pace and time left come with the next one", flush=True)
        self.done = 0
        self.epoch, self.epoch_started, self.shown = epoch, time.monotonic(), time.monotonic()
        self.bar = tqdm(
            total=self.num_iterations, desc=f"epoch {epoch + 1}/{self.num_epochs}", unit="it", leave=False, disable=self.hidden
        )

    def step(self, loss: Tensor | float) -> None:
        """Count one iteration. Reading the loss waits for the GPU, so it is read twice a second at most."""
        assert self.bar is not None and self.run_started is not None
        self.bar.update()
        self.done += 1
        now = time.monotonic()
        if not self.bar.disable and now - self.shown > 0.5:
            self.shown = now
            self.bar.set_postfix_str(self.said(loss))
        if self.in_lines and (spent := now - self.run_started) >= self.next_line:
            self.next_line = spent + min(max(PAUSES[0], spent / 2), PAUSES[1])
            done, total = self.epoch * self.num_iterations + self.done, self.num_epochs * self.num_iterations
            print(f"step {done:,} of {total:,}: {self.said(loss)}", flush=True)

    def said(self, loss: Tensor | float) -> str:
        """The loss, and how fast the epoch is."""
        rate = self.done * self.batch_size / max(time.monotonic() - self.epoch_started, 1e-6)
        return f"loss {float(loss):.4f}, {rate:.1f} crops/s, {self.left(self.done / self.num_iterations)} left"

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
