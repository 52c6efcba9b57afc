"""Ranks: the processes that share a training, one for each GPU, on one machine or many.

nnU-Net starts them itself on one machine (`-num_gpus`); `torchrun` and `srun` start them on any number of machines.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_csm.errors import UserError, exit_on_user_error

# long enough for the slowest rank to read its volumes
TIMEOUT = timedelta(minutes=30)
PORT = 29512


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    A batch belongs to all ranks, and each has some of its samples. Since draws are functions of a place in the batch, the
    batch of several ranks is the batch of one.
    """

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    num_local: int = 1

    def samples_of(self, batch_size: int) -> range:
        """Numbers of the samples of a batch that this rank makes and learns from.

        Raises:
            UserError: fewer samples than ranks.
        """
        if batch_size < self.num_ranks:
            raise UserError(
                f"a batch of {batch_size} cannot be shared by {self.num_ranks} ranks; use at most {batch_size} ranks (-num_gpus, "
                f"--nproc_per_node), or plan with a larger batch"
            )
        return range(self.rank * batch_size // self.num_ranks, (self.rank + 1) * batch_size // self.num_ranks)

    def sum(self, value: Tensor) -> Tensor:
        """Over all ranks."""
        if self.num_ranks > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in their order."""
        if self.num_ranks == 1:
            return [value]
        values = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all are here."""
        if self.num_ranks > 1:
            dist.barrier()

    def shared(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network with gradients that are means over all ranks."""
        if self.num_ranks == 1:
            return network
        # buffers are equal everywhere, or hold what a rank has counted itself
        return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False)

    def device(self, given: torch.device) -> torch.device:
        """This rank's own."""
        return torch.device("cuda", self.local_rank) if given.type == "cuda" else given


def running() -> Ranks:
    """The ranks of this process, whoever started them.

    Raises:
        UserError: started by torchrun, but by a command that does not join the others.
    """
    num_started = int(os.environ.get("WORLD_SIZE", "1"))
    if num_started > 1 and not dist.is_initialized():
        raise UserError(
            f"one of {num_started} processes that torchrun started, but nnU-Net's own command does not join them; "
            f"use `torchrun ... -m nnunet_csm pretrain` or `finetune`"
        )
    return _joined()


def _joined() -> Ranks:
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    rank, size = dist.get_rank(), dist.get_world_size()
    if os.environ.get("WORLD_SIZE") != str(size):
        # nnU-Net's own ranks are all on one machine, whatever started the process that started them
        return Ranks(rank, size, rank, size)
    return Ranks(rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size)))


@contextmanager
def started(device: str, num_gpus: int = 1) -> Iterator[Ranks]:
    """Join the ranks that `torchrun` or `srun` started; without them, this process is the only one.

    Args:
        device: cuda or cpu.
        num_gpus: ranks that nnU-Net is asked to start itself.

    Raises:
        UserError: no way to reach the others, fewer GPUs than ranks, or no NCCL.
    """
    _take_over_from_slurm()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        if num_gpus > 1 and device != "cuda":
            raise UserError(
                f"-num_gpus {num_gpus} is for -device cuda; several ranks on {device} are started by torchrun or srun"
            )
        if num_gpus > 1 and (found := torch.cuda.device_count()) < num_gpus:
            raise UserError(f"-num_gpus {num_gpus}, but this machine has {found} GPUs; lower it, or check with nvidia-smi")
        yield _joined()
        return
    if num_gpus > 1:
        raise UserError("-num_gpus is for one call without torchrun or srun; leave it out, they start the ranks")
    if device == "cuda" and not dist.is_nccl_available():
        raise UserError(
            "this build of torch has no NCCL, by which GPUs exchange gradients; install one that has, or train on one GPU"
        )
    if device == "cuda":
        local_rank, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= found:
            raise UserError(
                f"rank {local_rank} of this machine has no GPU: {found} found; lower --nproc_per_node, or have srun show every "
                f"task all GPUs of its machine (--gpus-per-node instead of --gpus-per-task, --gpu-bind=none)"
            )
        torch.cuda.set_device(local_rank)
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise UserError(f"the ranks did not find each other at {address} ({error}); start them with torchrun or srun") from None
    before = signal.signal(signal.SIGTERM, _stopped)
    try:
        yield _joined()
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def leave(ranks: Ranks, code: int) -> int:
    """End a rank whose work is done, where it is one of several; otherwise, return the exit code.

    At once: of ranks that take their interpreter down in the ordinary way, torch's threads abort one in ten ("terminate called
    without an active exception"; seen with gloo and torch 2.15), and torchrun then takes all for failed.
    """
    if ranks.num_ranks > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _stopped(*_: object) -> None:
    """torchrun and SLURM end the other ranks so when one has died."""
    with exit_on_user_error():
        raise UserError(
            f"rank {os.environ.get('RANK')} was stopped, as another rank ended or the job was cancelled; see the first failure, "
            f"then go on from the latest checkpoint with --c, on any number of ranks"
        )


@contextmanager
def lost_rank_explained(ranks: Ranks) -> Iterator[None]:
    """When another rank dies, the exchange with it fails: say so.

    Raises:
        UserError: instead of the error of the exchange.
    """
    try:
        yield
    except RuntimeError as error:
        lost = ("Connection closed by peer", "Connection reset", "NCCL", "gloo", "Broken pipe", "Socket")
        if ranks.num_ranks == 1 or not any(word in str(error) for word in lost):
            raise
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"rank {ranks.rank} of {ranks.num_ranks} lost another rank ({first_line}); see why that one ended, then go on from "
            f"the latest checkpoint with --c, on any number of ranks"
        ) from None


def _take_over_from_slurm() -> None:
    """What `torchrun` would set, from what `srun` sets, when it started several tasks and torchrun did not."""
    # of the step: a batch script without srun is one process, however many tasks its job has
    num_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "WORLD_SIZE" in os.environ or num_tasks == 1 or "SLURM_PROCID" not in os.environ:
        return
    names = os.environ.get("SLURM_STEP_NODELIST", "localhost")
    try:
        first = subprocess.run(["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=True)
        address = first.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        address = names
    os.environ.setdefault("MASTER_ADDR", address)
    # jobs that share a machine must not share a port
    os.environ.setdefault("MASTER_PORT", str(PORT + int(os.environ.get("SLURM_JOB_ID", "0")) % 1000))
    os.environ["WORLD_SIZE"], os.environ["RANK"] = str(num_tasks), os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    os.environ["LOCAL_WORLD_SIZE"] = per_node.split("(")[0].split(",")[0]
