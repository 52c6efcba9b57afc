"""Cross-series masking: what is hidden of each sample (paper III-B, figure 3)."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnunet_csm.data.crops import MIN_SPAN
from nnunet_csm.data.draws import Draws, What
from nnunet_csm.model.tokens import Size, to_tokens
from nnunet_csm.plans import Masking

# beyond every drawn integer
LAST = 2**63 - 1


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

    def __getitem__(self, samples: slice) -> "Mask":
        """That of some samples."""
        return Mask(self.hidden[samples], self.rebuilt[samples], self.visible[samples])

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


def draw_mask(draws: Draws, series_present: Bool[Tensor, "b s"], num_shown: int, num_tokens: int, masking: Masking) -> Mask:
    """Draw a mask for a batch in which every sample keeps `num_shown` series visible in part.

    Nothing here waits for the device, and no shape depends on a drawn value, so that it can be captured in a CUDA graph.

    Args:
        draws: source of all randomness.
        series_present: series each sample has; each must have at least `num_shown`.
        num_shown: series of which some tokens are visible, p - k.
        num_tokens: tokens of one series, l.
        masking: ratio, and whether series share places.
    """
    b, s = series_present.shape
    # looking at it would wait for a GPU
    assert series_present.is_cuda or int(series_present.sum(1).min()) >= num_shown, (
        "a sample has fewer series than are to be shown"
    )
    count = num_visible(num_tokens, masking)

    preference = draws.integers(What.SERIES, s).masked_fill(~series_present, LAST)
    shown = smallest(preference, num_shown)
    places = draws.integers(What.TOKENS, s * num_tokens).view(b, s, num_tokens)
    if masking.places == "shared":
        places = places[:, :1]
    chosen = smallest(places, count).expand(b, s, num_tokens)

    hidden = ~(chosen & shown[..., None])
    # a stable sort leaves the visible ones in front, in rising order
    visible = hidden.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)[:, : num_shown * count]
    in_loss = series_present if masking.hidden_series != "ignored" else series_present & shown
    return Mask(hidden, hidden & in_loss[..., None], visible)


def without_background(mask: Mask, volume: Float[Tensor, "b s z y x"], token_size: Size) -> Mask:
    """The mask with hidden tokens in which nothing varies left out of the loss.

    A sample of which nothing would be left keeps all: alone, so that ranks and parts of a batch agree.

    Args:
        mask: as drawn.
        volume: the patches.
        token_size: of a token of one series.
    """
    tokens = to_tokens(volume, token_size)
    # a z-scored series has a deviation of 1
    varies = mask.rebuilt & (tokens.amax(-1) - tokens.amin(-1) > MIN_SPAN)
    return replace(mask, rebuilt=torch.where(varies.flatten(1).any(1)[:, None, None], varies, mask.rebuilt))


def smallest(values: Int[Tensor, "... n"], num: int) -> Bool[Tensor, "... n"]:
    """True at the `num` smallest of the last axis; drawn 63-bit integers do not tie."""
    return values <= values.sort(-1).values[..., num - 1 : num]
