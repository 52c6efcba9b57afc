"""InfoNCE of voxels: what it is, however it is made."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_csm.pretext import info_nce
from nnunet_csm.pretext.info_nce import contrast, retrieved


def naive(outputs: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """InfoNCE of every voxel by itself, both directions."""
    total = torch.zeros(())
    numbers = valid.nonzero()[:, 0].tolist()
    for one, two in ((0, 1), (1, 0)):
        for number in numbers:
            own = outputs[one, number] @ outputs[two, number] / temperature
            against = [outputs[two, other] for other in numbers] + [outputs[one, other] for other in numbers if other != number]
            scores = torch.stack(against) @ outputs[one, number] / temperature
            total = total + (scores.exp().sum().log() - own) / 2
    return total


@pytest.mark.parametrize("rows", [1, 3, 7, 14, 1000])
def test_the_loss_is_infonce_however_many_rows_are_made_at_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info_nce, "ROWS", rows)
    random = torch.Generator().manual_seed(rows)
    given = torch.randn(2, 7, 5, generator=random)
    valid = torch.tensor([True, True, False, True, True, True, False])
    gradients = []
    for loss in (contrast, naive):
        raw = given.clone().requires_grad_()
        value = loss(F.normalize(raw, dim=-1), valid, 0.1)
        value.backward()
        gradients.append((value.detach(), raw.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
    # what does not count has no part
    assert gradients[0][1] is not None and not gradients[0][1][:, ~valid].any()


def test_similarities_are_not_of_16_bits() -> None:
    outputs = F.normalize(torch.randn(2, 50, 16), dim=-1)
    expected = contrast(outputs, torch.ones(50, dtype=torch.bool), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert contrast(outputs, torch.ones(50, dtype=torch.bool), 0.1).equal(expected)


def test_a_voxel_is_retrieved_when_it_is_nearest_in_the_other_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info_nce, "ROWS", 3)
    ones, valid = torch.eye(7), torch.ones(7, dtype=torch.bool)
    assert retrieved(torch.stack([ones, ones]), valid) == 7
    assert retrieved(torch.stack([ones, ones.roll(1, 0)]), valid) == 0
    # 3 and 4 take each other for themselves, where they count
    others = ones.clone()
    others[[3, 4]] = ones[[4, 3]]
    assert retrieved(torch.stack([ones, others]), valid) == 5
    valid[[3, 4]] = False
    assert retrieved(torch.stack([ones, others]), valid) == 5
