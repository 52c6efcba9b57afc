"""The best linear map from the visible tokens of a place to a hidden token there: what a network is to beat."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool3d

from nnunet_csm.errors import UserError
from nnunet_csm.judging.voxel_regression import RidgeBaseline
from nnunet_csm.model.tokens import Size, to_volume

# of the statistics, which bound the numbers that the tokens of all series at a place are pooled to
MAX_BYTES, MAX_INPUTS = 2**29, 1024
# tokens that are looked at
MAX_TOKENS = 20_000
# at a time, which bounds memory
CHUNK = 2_000
# one of so many chunks is held out to choose the shrinkage
HELD_OUT = 4
# in units of the mean variance of an input; with an infinite one, the voxel-wise map is left
ALPHAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)
# maps that are kept at a time
NUM_KEPT = 16


class TokenRidge:
    """Ridge regression of all voxels of a hidden token on all voxels of the other series' tokens visible at its place.

    There is one map for every hidden series and every set of visible ones. It is shrunk towards the voxel-wise map
    (`RidgeBaseline`), not towards zero: what is regressed is what that map leaves over. Inputs are pooled to means of cells when
    tokens have many voxels, so that memory is bounded; since each voxel itself is in the voxel-wise part, little is lost by that.
    Voxels that are not scored (background) are no targets: there the voxel-wise map is taken to leave over nothing.

    Attributes:
        alpha: the best of those offered, on chunks that are held out from the fit, with all other series visible.
    """

    def __init__(self, voxelwise: RidgeBaseline, token_size: Size, max_inputs: int = MAX_INPUTS) -> None:
        self.voxelwise, self.token_size = voxelwise, token_size
        self.num_series, self.num_voxels = len(voxelwise.mean), math.prod(token_size)
        affordable = MAX_BYTES // (8 * self.num_series * (self.num_series + 1) * self.num_voxels)
        self.cell = cell_size(token_size, max(1, min(max_inputs, affordable) // self.num_series))
        self.alpha = math.inf
        self._map = lru_cache(maxsize=NUM_KEPT)(self._solved)

    def fit(
        self, batches: Iterable[tuple[Float[Tensor, "_n s v"], Bool[Tensor, "_n s v"]]], alphas: Sequence[float] = ALPHAS
    ) -> "TokenRidge":
        """Choose alpha, then fit to all tokens; forgets an earlier fit.

        Args:
            batches: tokens of places at which every series is present, and their voxels that are scored. After about
                `MAX_TOKENS` of them no more are asked for. Batches of more than `CHUNK` are cut; what is held out are whole
                batches, or chunks of them.
            alphas: to choose from.

        Raises:
            UserError: fewer than two batches with tokens, and none that could be cut, so that nothing can be held out.
        """
        num_tokens = 0
        held_out: list[tuple[Tensor, Tensor]] = []
        self._forget()
        for number, (tokens, inside) in enumerate(chunks(batches)):
            # the second of every few, so that two are enough
            if number % HELD_OUT == 1:
                held_out.append((tokens, inside))
            else:
                self._add(tokens, inside)
            num_tokens += len(tokens)
            if num_tokens >= MAX_TOKENS:
                break
        if not held_out:
            raise UserError("too few patches hold every series to choose a linear map of tokens by")
        errors = {alpha: sum(self._error(*chunk, alpha) for chunk in held_out) for alpha in alphas}
        self.alpha = min(errors, key=errors.__getitem__)
        for chunk in held_out:
            self._add(*chunk)
        # of the fit without what was held out
        self._map.cache_clear()
        return self

    def estimates(
        self, tokens: Float[Tensor, "b s l v"], visible: Bool[Tensor, "b s l"]
    ) -> tuple[Float[Tensor, "b s l v"], Float[Tensor, "b s l v"]]:
        """Every token from the other series' tokens visible at its place, by the voxel-wise map and by this one.

        Whether a token itself is visible plays no part. Where nothing is visible, these are the mean and the mean token.
        """
        flat, seen = tokens.transpose(1, 2).flatten(0, 1).float(), visible.transpose(1, 2).flatten(0, 1)
        linear, token_linear = torch.empty_like(flat), torch.empty_like(flat)
        bits = (seen.long() << torch.arange(self.num_series, device=seen.device)).sum(1)
        for series in range(self.num_series):
            others = bits & ~(1 << series)
            for number in others.unique().tolist():
                shown = tuple(other for other in range(self.num_series) if number >> other & 1)
                here = others == number
                linear[here, series], token_linear[here, series] = self._apply(flat[here], shown, series, self.alpha)
        batch, places = len(tokens), tokens.shape[2]
        both = (one.unflatten(0, (batch, places)).transpose(1, 2) for one in (linear, token_linear))
        return next(both), next(both)

    def _apply(self, tokens: Tensor, shown: tuple[int, ...], series: int, alpha: float) -> tuple[Tensor, Tensor]:
        weights, intercept = self.voxelwise.coefficients(shown, series)
        linear = torch.einsum("nsv,s->nv", tokens[:, list(shown)], torch.from_numpy(weights).to(tokens)) + intercept
        if math.isinf(alpha):
            return linear, linear
        matrix, mean = self._map(shown, series, alpha)
        if not shown:
            return linear, linear + mean.to(tokens)
        inputs = self._pooled(tokens[:, list(shown)] - self.shift.to(tokens)[list(shown)]).flatten(1)
        return linear, linear + inputs @ matrix.to(tokens) + mean.to(tokens)

    def _solved(self, shown: tuple[int, ...], series: int, alpha: float) -> tuple[Tensor, Tensor]:
        """Map of what the voxel-wise map leaves over: matrix and intercept on pooled, shifted inputs."""
        weights, intercept = self.voxelwise.coefficients(shown, series)
        # what is left over is itself linear in the voxels of all series, shifted, and in 1
        left_over = self.sums.new_zeros(self.num_series + 1)
        left_over[series], left_over[list(shown)] = 1.0, -torch.from_numpy(weights).to(self.sums)
        left_over[-1] = (left_over[:-1] * self.shift[:, 0]).sum() - intercept
        mean_left = torch.einsum("sv,s->v", self.sums[series], left_over) / self.num_tokens
        if not shown:
            return mean_left.new_empty(0, self.num_voxels), mean_left
        rows = list(shown)
        mean = (self.inputs[rows] / self.num_tokens).flatten()
        to_left = torch.einsum("idsv,s->idv", self.products[series][rows], left_over).flatten(0, 1) / self.num_tokens
        to_left -= mean[:, None] * mean_left
        among = self.among[rows][:, :, rows].flatten(2).flatten(0, 1) / self.num_tokens - mean[:, None] * mean
        ridge = alpha * among.diagonal().mean()
        matrix = torch.linalg.solve(among + ridge * torch.eye(len(among)).to(among), to_left)
        return matrix, mean_left - mean @ matrix

    def _error(self, tokens: Tensor, inside: Tensor, alpha: float) -> float:
        """Squared error with all other series visible."""
        error = 0.0
        for series in range(self.num_series):
            others = tuple(other for other in range(self.num_series) if other != series)
            left_over = tokens[:, series] - self._apply(tokens, others, series, alpha)[1]
            error += float(left_over[inside[:, series]].double().square().sum())
        return error

    def _forget(self) -> None:
        self.num_tokens = 0
        self._map.cache_clear()
        # digits: what is summed up lies around zero
        self.shift = torch.from_numpy(self.voxelwise.mean).double()[:, None]

    def _add(self, tokens: Tensor, inside: Tensor) -> None:
        """Sums over tokens: inputs (i d), their products (i d j d), and, where a hidden series is scored, voxels of all series
        and 1 (h s v), also times inputs (h i d s v)."""
        self.shift = self.shift.to(tokens.device)
        shifted = tokens.double() - self.shift
        inputs = self._pooled(shifted)
        flat = inputs.flatten(1)
        with_one = torch.cat([shifted, torch.ones_like(shifted[:, :1])], 1)
        if not self.num_tokens:
            self.inputs, self.among = inputs.new_zeros(inputs.shape[1:]), inputs.new_zeros(*inputs.shape[1:], *inputs.shape[1:])
            self.sums = inputs.new_zeros(self.num_series, *with_one.shape[1:])
            self.products = inputs.new_zeros(self.num_series, *inputs.shape[1:], *with_one.shape[1:])
        self.num_tokens += len(tokens)
        self.inputs += inputs.sum(0)
        # in place: the products are as large as all that is kept
        self.among.view(flat.shape[1], -1).addmm_(flat.T, flat)
        for series in range(self.num_series):
            scored = with_one * inside[:, series, None]
            self.sums[series] += scored.sum(0)
            self.products[series].view(flat.shape[1], -1).addmm_(flat.T, scored.flatten(1))

    def _pooled(self, tokens: Float[Tensor, "n s v"]) -> Float[Tensor, "n s d"]:
        """Means of cells."""
        if math.prod(self.cell) == 1:
            return tokens
        return avg_pool3d(to_volume(tokens[:, :, None], (1, 1, 1), self.token_size), self.cell).flatten(2)


def chunks(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, each cut into parts of at most `CHUNK` along the first axis; none is empty."""
    for tokens, inside in batches:
        if len(tokens):
            yield from zip(tokens.split(CHUNK), inside.split(CHUNK), strict=True)


def cell_size(token_size: Size, max_cells: int) -> Size:
    """The smallest cells, as near to cubes of voxels as powers of two allow, of which a token has at most `max_cells`."""
    cell = [1, 1, 1]
    while math.prod(token_size) > max_cells * math.prod(cell):
        # an axis along which most cells lie
        axis = max(range(3), key=lambda a: token_size[a] // cell[a])
        cell[axis] *= 2
    z, y, x = cell
    return z, y, x
