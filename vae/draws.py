"""Coins by the million. torch's generator spends a word of 32 bits on each number, and most of a draw's time.

Here a number takes 15 bits of each quarter of a word of 64: coins of probability p fall as those of the
multiple of 2^-15 that is nearest to p, of which no draws of a training can tell, and 0 and 1 remain certain.
"""

import torch
from torch import Tensor

_NUMBERS = 2**15
_SIGNS = -0x7FFF_7FFF_7FFF_8000  # the sign bits of four numbers of 16 bits
_BLOCK = 2**22  # values worked on at once: bounds memory


def limits(p: Tensor) -> Tensor:
    """p (...) in [0, 1] -> int16 for `coins`, of the same shape."""
    found = torch.empty(p.shape, dtype=torch.int16, device=p.device)
    for some, values in zip(found.view(-1).split(_BLOCK), p.reshape(-1).split(_BLOCK), strict=True):
        some.copy_((values * _NUMBERS).round_().sub_(_NUMBERS))
    return found


def coins(below: Tensor) -> Tensor:
    """What `limits` gave for p -> 1 with probability p and 0 otherwise, float32, of the same shape."""
    return torch.lt(_numbers(below), below, out=torch.empty(below.shape, device=below.device))


def mask_like(x: Tensor, keep: float) -> Tensor:
    """x (...) -> 1 with probability `keep` and 0 otherwise, float32, of the same shape."""
    return torch.lt(_numbers(x), round(_NUMBERS * keep) - _NUMBERS, out=torch.empty(x.shape, device=x.device))


def _numbers(like: Tensor) -> Tensor:
    """Whole numbers from -2^15 to -1, int16."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    words.random_(torch.iinfo(torch.int64).min, None).bitwise_or_(_SIGNS)
    return words.view(torch.int16)[: like.numel()].view(like.shape)
