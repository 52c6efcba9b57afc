"""Cross-series masking: what is hidden of each sample (paper III-B, figure 3)."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnunet_csm.data.crops import MIN_SPAN
from nnunet_csm.data.draws import Draws, What
from nnunet_csm.model.tokens import to_tokens
from nnunet_csm.pretext.base import Drawn
from nnunet_csm.schema import Index, ShareBelowOne, Size

# beyond every drawn integer
LAST = 2**63 - 1


@dataclass(frozen=True)
class Masking:
    """What pretraining hides (paper III-B, tables VII and VIII).

    Attributes:
        mask_ratio: share of the tokens hidden in a series that is not hidden whole.
        places: each series at its own places, or all at the same.
        hidden_series: whether series are hidden whole, and whether those are rebuilt.
        background: whether hidden tokens in which nothing varies are rebuilt or stay out of the loss.
        fewest_hidden: of the series hidden whole, the fewest: 1 as in the paper, or 0 (UniME's range); at least one stays
            visible.
        counts: how the visible tokens are shared among the series that are not hidden whole: the same number of each; "pooled",
            drawn from the tokens of all of them together (UniME); or by shares drawn anew for every sample, all shares as likely
            (BM-MAE's Dirichlet distribution with parameters of 1). But for "equal", a series may by chance show none.
    """

    mask_ratio: ShareBelowOne
    places: Literal["independent", "shared"]
    hidden_series: Literal["rebuilt", "ignored", "none"]
    background: Literal["rebuilt", "ignored"] = "rebuilt"
    fewest_hidden: Index = 1
    counts: Literal["equal", "pooled", "dirichlet"] = "equal"


@dataclass(frozen=True)
class Mask(Drawn):
    """A drawn mask. True means hidden from the encoder."""

    hidden: Bool[Tensor, "b s l"]
    """Everything the encoder does not see: hidden tokens, hidden series, absent series."""
    rebuilt: Bool[Tensor, "b s l"]
    """The hidden tokens that enter the loss: never those of absent series."""
    visible: Int[Tensor, "b k"]
    """Numbers of the visible tokens in the patch, in rising order."""
    asked: Int[Tensor, "b m"]
    """Numbers of the hidden tokens that the decoder is asked for: all of them, or some, see `ask_some`."""

    @property
    def series_hidden(self) -> Bool[Tensor, "b s"]:
        """Series of which nothing is visible (present or not)."""
        return self.hidden.all(dim=2)

    @property
    def weight(self) -> Float[Tensor, "b m"]:
        """What the error of every asked token counts.

        0 for those that are not rebuilt, else 1 when all hidden tokens are asked for. When some are, each stands for others of
        its sample as well: the tokens to be rebuilt over those of them that are asked for.
        """
        counted = self.rebuilt.flatten(1).gather(1, self.asked).float()
        return counted * (self.rebuilt.flatten(1).sum(1) / counted.sum(1).clamp(min=1))[:, None]


def num_visible(num_tokens: int, mask_ratio: float) -> int:
    """Visible tokens of a series that is not hidden whole: 27 of 216 at the paper's 87.5 %."""
    return max(1, round((1.0 - mask_ratio) * num_tokens))


def total_visible(num_shown: int, num_tokens: int, masking: Masking) -> int:
    """Visible tokens of a sample that keeps `num_shown` series visible in part: what no draw changes."""
    if masking.counts == "equal":
        return num_shown * num_visible(num_tokens, masking.mask_ratio)
    return num_visible(num_shown * num_tokens, masking.mask_ratio)


def num_asked(num_hidden: int, share: float) -> int:
    """Hidden tokens of a patch that a training step asks the decoder for."""
    return min(num_hidden, max(1, round(share * num_hidden)))


def shown_series_weights(series_present: Bool[Tensor, "c s"], masking: Masking) -> Tensor:
    """Probability, for each case c, that 1, 2, ..., s of its series stay visible.

    With p series present, k in [1, p - 1] are hidden whole (or from `fewest_hidden` on), each k as likely as the others; none
    when p = 1 or when no series is to be hidden.

    Returns:
        Float tensor (c, s); entry (c, u - 1) is the probability of u visible series.
    """
    num_present = series_present.sum(1, keepdim=True)
    shown = torch.arange(1, series_present.shape[1] + 1)
    if masking.hidden_series == "none":
        allowed = shown == num_present
    else:
        allowed = shown <= (num_present - masking.fewest_hidden).clamp(min=1)
    return allowed / allowed.sum(1, keepdim=True)


def draw_mask(draws: Draws, series_present: Bool[Tensor, "b s"], num_shown: int, num_tokens: int, masking: Masking) -> Mask:
    """Draw a mask for a batch in which every sample keeps `num_shown` series visible in part.

    Nothing here waits for the device, and no shape depends on a drawn value, so that it can be captured in a CUDA graph.

    Args:
        draws: source of all randomness.
        series_present: series each sample has; each must have at least `num_shown`.
        num_shown: series of which some tokens are visible, p - k.
        num_tokens: tokens of one series, l.
        masking: ratio, whether series share places, and how visible tokens are shared among series.
    """
    b, s = series_present.shape
    total = total_visible(num_shown, num_tokens, masking)

    preference = draws.integers(What.SERIES, s).masked_fill(~series_present, LAST)
    shown = smallest(preference, num_shown)
    places = draws.integers(What.TOKENS, s * num_tokens).view(b, s, num_tokens)
    if masking.places == "shared":
        places = places[:, :1]
    if masking.counts == "equal":
        chosen = smallest(places, total // num_shown).expand(b, s, num_tokens)
    elif masking.counts == "pooled":
        chosen = smallest(places.masked_fill(~shown[..., None], LAST).flatten(1), total).view_as(places)
    else:
        # beyond the numbers that places and `ask_some` are drawn with
        drawn = draws.uniform(What.TOKENS, s, first=2 * s * num_tokens)
        chosen = places.argsort(-1).argsort(-1) < dirichlet_counts(drawn, shown, num_tokens, total)[..., None]

    hidden = ~(chosen & shown[..., None])
    in_loss = series_present if masking.hidden_series != "ignored" else series_present & shown
    return Mask(hidden, hidden & in_loss[..., None], *apart(hidden.flatten(1), total))


def dirichlet_counts(drawn: Float[Tensor, "b s"], shown: Bool[Tensor, "b s"], num_tokens: int, total: int) -> Int[Tensor, "b s"]:
    """Visible tokens of each series by shares from the Dirichlet distribution with parameters of 1: `total` in all, exactly.

    What a share asks for beyond the tokens of its series goes to the others in proportion. BM-MAE draws all shares again instead;
    neither happens when `total` is at most `num_tokens`, as with a quarter of the tokens of up to four series. Fractions of
    tokens go to the largest remainders, where BM-MAE rounds each share and then fills up or cuts.

    Args:
        drawn: multiples of 2**-24, uniform on [0, 1).
        shown: series that take part.
        num_tokens: of a series, l.
        total: at most l times the number of series that take part.
    """
    # exponential variates over their sum are such shares; half a step from 0 and 1
    counts = -(drawn.double() + 2.0**-25).log() * shown
    counts = counts * (total / counts.sum(1, keepdim=True))
    for _ in range(shown.shape[1]):
        # a round fills a series or more, or changes nothing
        full = counts >= num_tokens
        others = counts.masked_fill(full, 0.0)
        rest = total - num_tokens * full.sum(1, keepdim=True)
        factor = rest / others.sum(1, keepdim=True).clamp(min=torch.finfo(torch.double).tiny)
        counts = (others * factor).masked_fill(full, float(num_tokens))
    whole = counts.floor()
    left = total - whole.sum(1, keepdim=True)
    return (whole + ((whole - counts).argsort(1).argsort(1) < left)).long()


def apart(hidden: Bool[Tensor, "b n"], num_visible: int) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b m"]]:
    """Numbers of the visible and of the hidden tokens, each in rising order."""
    # a stable sort leaves the visible ones in front
    numbers = hidden.to(torch.uint8).argsort(dim=1, stable=True)
    # not views: what a network was compiled for, and a graph captured with, has its strides
    return numbers[:, :num_visible].contiguous(), numbers[:, num_visible:].contiguous()


def ask_some(mask: Mask, draws: Draws, share: float, num_joined: int = 1) -> Mask:
    """The mask with a share of the hidden tokens to be asked for, drawn among those that enter the loss as far as they suffice.

    Their `weight` keeps the expected loss that of all (CrossMAE, arXiv 2401.14391, rebuilds a part of them too). Nothing here
    waits for the device.

    Args:
        mask: one that asks for all hidden tokens.
        draws: as for the mask; other numbers of them are used.
        share: above 0 and at most 1, which leaves the mask as it is.
        num_joined: series whose tokens of one place are asked for together; 1 unless they are joint.
    """
    if share == 1.0:
        return mask
    asked = mask.asked.unflatten(1, (num_joined, -1))
    num_hidden, num_places = asked.shape[2], mask.hidden[0].numel()
    in_loss = mask.rebuilt.flatten(1).gather(1, mask.asked).view_as(asked).any(1)
    # beyond the numbers that the places were drawn with
    preference = draws.integers(What.TOKENS, num_hidden, first=num_places) >> 1
    order = torch.where(in_loss, preference, preference + (LAST >> 1)).argsort(1)[:, : num_asked(num_hidden, share)]
    return replace(mask, asked=asked.gather(2, order[:, None].expand(-1, num_joined, -1)).flatten(1))


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
