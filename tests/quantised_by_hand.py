"""Linear layers with packed weights, made the way quantisation libraries make theirs; no kernel is needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear4bit(nn.Linear):
    """A linear layer whose weight is packed, two numbers of four bits in a byte, with one scale for each output."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        weight = plain.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 7
        codes = (weight / self.scale).round().to(torch.int8) + 8
        flat = codes.flatten().to(torch.uint8)
        self.weight = nn.Parameter((flat[::2] << 4 | flat[1::2])[:, None], requires_grad=False)
        self.bias = plain.bias

    def unpacked(self) -> Tensor:
        packed = self.weight[:, 0]
        codes = torch.stack([packed >> 4, packed & 15], dim=1).view(self.out_features, self.in_features)
        return (codes.float() - 8) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpacked().to(x.dtype), self.bias)


class Linear8bitLt(nn.Linear):
    """A linear layer whose weight is of eight bits, and of the shape that it would have anyway."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        weight = plain.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = plain.bias

    def unpacked(self) -> Tensor:
        return self.weight.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpacked().to(x.dtype), self.bias)


def quantised(model: nn.Module, kind: type) -> nn.Module:
    """The model with packed linear layers, in place."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, kind(module))
    return model


def unpacked(model: nn.Module) -> nn.Module:
    """The model with plain linear layers of the same numbers, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight = nn.Parameter(module.unpacked())
            plain.bias = module.bias
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, plain)
    return model
