"""Feature maps sigma: what a key or a query becomes before it meets the memory.

Each maps ``[..., Dk]`` to ``[..., feature_dim(name, Dk)]``. All but ``identity`` are non-negative, which the
normaliser of the ``linear`` and ``delta`` rules needs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def elu_plus_one(x: Tensor) -> Tensor:
    """``ELU(x) + 1`` (Katharopoulos et al. 2020, eq. 7)."""
    return F.elu(x) + 1


def relu(x: Tensor) -> Tensor:
    """``max(x, 0)``."""
    return F.relu(x)


def identity(x: Tensor) -> Tensor:
    """``x`` itself: for the delta rules, which normalise keys instead of dividing by ``z``."""
    return x


def dpfp(x: Tensor) -> Tensor:
    """DPFP with nu = 1 (Schlag et al. 2021, eq. 37): products of neighbouring rectified features; doubles the width."""
    rectified = torch.cat([F.relu(x), F.relu(-x)], dim=-1)
    return rectified * rectified.roll(1, dims=-1)


def hedgehog(x: Tensor) -> Tensor:
    """``[softmax(x), softmax(-x)]`` (Zhang et al. 2024, eq. 6, without its trained projection); doubles the width."""
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu_plus_one": elu_plus_one,
    "relu": relu,
    "identity": identity,
    "dpfp": dpfp,
    "hedgehog": hedgehog,
}


def feature_dim(name: str, head_dim: int) -> int:
    """Width of ``FEATURE_MAPS[name]``'s output for inputs of width ``head_dim``."""
    return head_dim * (2 if name in ("dpfp", "hedgehog") else 1)
