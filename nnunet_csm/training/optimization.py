"""Optimiser and learning rates of both stages."""

import math
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from nnunet_csm.model.encoder import Encoder
from nnunet_csm.plans import Schedule


def build_optimizer(network: nn.Module, encoder: Encoder, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW; no weight decay on biases, norms and embeddings; learning rates of the encoder fall towards its input.

    Args:
        network: all of it is optimised that has gradients.
        encoder: the part of `network` with layer-wise decay: stage i of n (from 0) gets `layer_decay ** (n - i)`.
    """
    stages = encoder.stages()
    stage_of = {id(parameter): number for number, stage in enumerate(stages) for parameter in stage}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            # a teacher's
            continue
        scale = schedule.layer_decay ** (len(stages) - stage_of.get(id(parameter), len(stages)))
        decays = parameter.ndim > 1 and "series_embedding" not in name and not name.endswith("bias")
        groups.setdefault((scale, schedule.weight_decay if decays else 0.0), []).append(parameter)
    # the largest rate first: nnU-Net prints and draws that of group 0
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0], -item[0][1]))
    device = next(network.parameters()).device.type
    fused, on_gpu = device in ("cuda", "cpu"), device == "cuda"
    optimizer = torch.optim.AdamW(
        [{"params": p, "lr_scale": scale, "weight_decay": decay} for (scale, decay), p in ordered],
        lr=schedule.learning_rate,
        betas=schedule.betas,
        fused=fused,
        capturable=on_gpu,
    )

    def keep_to_this_device(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group.update(fused=fused, capturable=on_gpu, lr=float(group["lr"]))

    # a checkpoint may come from a run on another device
    optimizer.register_load_state_dict_pre_hook(keep_to_this_device)
    return optimizer


def clipped_step(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Take a step with gradients of a norm of at most `max_norm`, as `clip_grad_norm_` makes them.

    The fused AdamW divides each gradient as it reads it (`grad_scale`, made for scaled losses), instead of all of them before.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not optimizer.defaults["fused"]:
        nn.utils.clip_grad_norm_(parameters, max_norm)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1)  # type: ignore[attr-defined]
    optimizer.step()


def build_scheduler(optimizer: torch.optim.Optimizer, schedule: Schedule) -> CosineLRScheduler:
    """Linear warm-up, then cosine decay to zero, by iteration: call `step_update(number of the iteration, from 1)`."""
    warmup = math.ceil(schedule.warmup * schedule.num_iterations)
    return CosineLRScheduler(
        optimizer,
        # one more, so that the last iteration still learns
        t_initial=schedule.num_iterations + 1 - warmup,
        warmup_t=warmup,
        warmup_prefix=True,
        warmup_lr_init=0.0,
        t_in_epochs=False,
        initialize=True,
    )
