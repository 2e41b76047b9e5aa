"""The processes that train together, as torchrun and accelerate start them; usually there is one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """This process and those beside it, each with its part of every batch.

    Args:
        device: Where the model is.

    Where a launcher says that there are several and none of them has spoken yet, they are joined here: by NCCL for a
    model on CUDA, else by gloo. They stay joined.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        started = dist.is_available() and dist.is_initialized()
        if not started and dist.is_available() and _launched():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            started = True
        self.count = dist.get_world_size() if started else 1
        self.rank = dist.get_rank() if started else 0

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and shows."""
        return self.rank == 0

    def part(self, rows: Sequence[int]) -> list[int]:
        """The rows of a batch that are this process's own."""
        return list(rows[self.rank :: self.count])

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all processes in the place of each tensor, which has the same shape in all of them."""
        if self.count == 1 or not tensors:
            return
        for alike in _by_kind(tensors):
            together = torch.cat([tensor.detach().reshape(-1) for tensor in alike]).to(self.device)
            dist.all_reduce(together)
            start = 0
            for tensor in alike:
                tensor.detach().copy_(together[start : start + tensor.numel()].view_as(tensor))
                start += tensor.numel()

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Put the first process's values in the place of each tensor."""
        if self.count == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().to(self.device, copy=True).contiguous()
            dist.broadcast(sent, 0)
            tensor.detach().copy_(sent)

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every process, on the CPU."""
        if self.count == 1:
            return [tensor]
        sent = tensor.detach().to(self.device).contiguous()
        found = [torch.empty_like(sent) for _ in range(self.count)]
        dist.all_gather(found, sent)
        return [one.cpu() for one in found]

    def agree(self, answer: bool) -> bool:
        """The first process's answer, in all."""
        if self.count == 1:
            return answer
        sent = torch.tensor([int(answer)], device=self.device)
        dist.broadcast(sent, 0)
        return bool(sent.item())

    def told(self, message: bytes) -> bytes:
        """The first process's message, in all."""
        if self.count == 1:
            return message
        length = torch.tensor([len(message)], device=self.device)
        dist.broadcast(length, 0)
        if not length.item():
            return b""
        sent = torch.zeros(int(length.item()), dtype=torch.uint8)
        if self.first:
            sent = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        sent = sent.to(self.device)
        dist.broadcast(sent, 0)
        return sent.cpu().numpy().tobytes()


def _launched() -> bool:
    """Whether a launcher has said how several processes find each other."""
    said = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}
    return all(said.values()) and said["WORLD_SIZE"].isdecimal() and int(said["WORLD_SIZE"]) > 1


def _by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors that can be joined, by dtype and device."""
    found: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(found.values())
