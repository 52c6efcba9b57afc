"""How long a training takes is told in words, before it is begun."""

import pytest
import torch
from factories import csm_plans

from nnunet_csm.errors import UserError
from nnunet_csm.plans import read_configuration
from nnunet_csm.pretext.cost import Cost, check_device, in_words, measured_speed, training_cost


@pytest.mark.parametrize(
    "least, most, words",
    [
        (5.0, 40.0, "about 1 minute"),
        (90.0, 300.0, "2 to 5 minutes"),
        (3500.0, 7200.0, "58 to 120 minutes"),
        (3 * 3600.0, 10 * 3600.0, "3 to 10 hours"),
        (2 * 86400.0, 7 * 86400.0, "2 to 7 days"),
        (8 * 86400.0, 9 * 86400.0, "about 1 week"),
        (700 * 86400.0, 1400 * 86400.0, "100 to 200 weeks"),
    ],
)
def test_a_time_in_words(least: float, most: float, words: str) -> None:
    assert in_words(least, most) == words


def test_a_time_follows_from_the_operations_and_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunet_csm.pretext.cost.measured_speed", lambda _: 1e9)
    cost = Cost(num_crops=3600, operations_per_crop=1.4e9)
    # at 70 and 20 % of that speed
    assert cost.time_on(torch.device("cpu")) == "2 to 7 hours"


def test_the_measured_speed_is_above_zero_and_leaves_the_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    assert measured_speed(torch.device("cpu")) > 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("schedule", ["pretraining", "finetuning_schedule", "classification"])
def test_without_cuda_the_error_tells_the_time_on_the_cpu_and_the_preset_for_it(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = read_configuration(csm_plans(), "3d_fullres", "plans")
    chosen = getattr(settings.csm, schedule)
    chosen = chosen.schedule if schedule == "classification" else chosen
    cost = training_cost(settings, chosen, 3)
    assert cost.num_crops == chosen.num_iterations * chosen.batch_size and cost.operations_per_crop > 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"no CUDA device.*-device cpu, which takes .* on 1 core of this machine.*-preset cpu"):
        check_device(torch.device("cuda"), settings, chosen, 3)
    check_device(torch.device("cpu"), settings, chosen, 3)
