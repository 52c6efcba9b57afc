"""Cross-series masking: what is hidden of each sample (paper III-B, figure 3)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nnunet_csm.plans import Masking


@dataclass(frozen=True)
class Mask:
    """A drawn mask. True means hidden from the encoder."""

    hidden: Bool[Tensor, "b s l"]
    """Everything the encoder does not see: hidden tokens, hidden series, absent series."""
    rebuilt: Bool[Tensor, "b s l"]
    """The hidden tokens that enter the loss: never those of absent series."""
    visible: Int[Tensor, "b k"]
    """Numbers of the visible tokens in the patch, in rising order."""

    @property
    def series_hidden(self) -> Bool[Tensor, "b s"]:
        """Series of which nothing is visible (present or not)."""
        return self.hidden.all(dim=2)

    def pin_memory(self) -> "Mask":
        """Called by torch's `DataLoader`."""
        return Mask(self.hidden.pin_memory(), self.rebuilt.pin_memory(), self.visible.pin_memory())

    def to(self, device: torch.device) -> "Mask":
        return Mask(*(t.to(device, non_blocking=True) for t in (self.hidden, self.rebuilt, self.visible)))


def num_visible(num_tokens: int, masking: Masking) -> int:
    """Visible tokens of a series that is not hidden whole: 27 of 216 at the paper's 87.5 %."""
    return max(1, round((1.0 - masking.mask_ratio) * num_tokens))


def shown_series_weights(series_present: Bool[Tensor, "c s"], masking: Masking) -> Tensor:
    """Probability, for each case c, that 1, 2, ..., s of its series stay visible.

    With p series present, k in [1, p - 1] are hidden whole, each k as likely as the others; none when p = 1 or when no
    series is to be hidden.

    Returns:
        Float tensor (c, s); entry (c, u - 1) is the probability of u visible series.
    """
    num_present = series_present.sum(1, keepdim=True)
    shown = torch.arange(1, series_present.shape[1] + 1)
    if masking.hidden_series == "none":
        allowed = shown == num_present
    else:
        allowed = (shown < num_present) | ((num_present == 1) & (shown == 1))
    return allowed / allowed.sum(1, keepdim=True)


def draw_mask(
    generator: torch.Generator, series_present: Bool[Tensor, "b s"], num_shown: int, num_tokens: int, masking: Masking
) -> Mask:
    """Draw a mask for a batch in which every sample keeps `num_shown` series visible in part.

    Args:
        generator: source of all randomness.
        series_present: series each sample has; each must have at least `num_shown`.
        num_shown: series of which some tokens are visible, p - k.
        num_tokens: tokens of one series, l.
        masking: ratio, and whether series share places.
    """
    (b, s), device = series_present.shape, series_present.device
    assert int(series_present.sum(1).min()) >= num_shown, "a sample has fewer series than are to stay visible"
    count = num_visible(num_tokens, masking)

    preference = torch.rand(b, s, generator=generator, device=device).masked_fill(~series_present, 2.0)
    shown = preference.argsort(1).argsort(1) < num_shown
    places = torch.rand(b, s if masking.places == "independent" else 1, num_tokens, generator=generator, device=device)
    chosen = (places.argsort(2).argsort(2) < count).expand(b, s, num_tokens)

    hidden = ~(chosen & shown[..., None])
    visible = (~hidden).flatten(1).nonzero()[:, 1].view(b, num_shown * count)
    in_loss = series_present if masking.hidden_series != "ignored" else series_present & shown
    return Mask(hidden, hidden & in_loss[..., None], visible)
