"""The low-rank factors of one adapted layer.

Formula (SPM, arXiv 2312.16145, eq. 3; the same as LoRA's): y = W x + (alpha / r) * up (down x).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from expunge.errors import InvalidInputError

# A dotted module path: identifiers or indices, no empty part, nothing that a file system would read as its own.
SITE_PATH = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*", re.ASCII)
MAX_SITE_PATH = 256


@dataclass(frozen=True, eq=False)
class Factors:
    """The two factors of one site and their alpha.

    Args:
        down: `[r, in]` for a Linear site, `[r, in, kh, kw]` for a Conv2d site.
        up: `[out, r]` for a Linear site, `[out, r, 1, 1]` for a Conv2d site.
        alpha: the scale's numerator; the delta is scaled by `alpha / r`.

    Raises:
        InvalidInputError: if the shapes do not belong together, the dtypes differ or are not floating point, or alpha
            is not a finite number above 0.
    """

    down: Tensor
    up: Tensor
    alpha: float = 1.0

    def __post_init__(self) -> None:
        problem = _shape_problem(self.down, self.up)
        if problem is not None:
            raise InvalidInputError(
                "Factors",
                expected="down [r, in] with up [out, r], or down [r, in, kh, kw] with up [out, r, 1, 1], r >= 1",
                found=problem,
                fix="Pass both factors of one site, unchanged.",
            )
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InvalidInputError(
                "Factors.alpha", expected="a finite number above 0", found=repr(self.alpha), fix="1.0 is the usual one."
            )

    @property
    def rank(self) -> int:
        """r, the number of rows of `down`."""
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        """alpha / r, what the product of the factors is multiplied by."""
        return self.alpha / self.rank

    @property
    def is_conv(self) -> bool:
        """Whether the site is a Conv2d."""
        return self.down.ndim == 4

    @property
    def in_features(self) -> int:
        """Input features of the site (input channels of a Conv2d)."""
        return int(self.down.shape[1])

    @property
    def out_features(self) -> int:
        """Output features of the site (output channels of a Conv2d)."""
        return int(self.up.shape[0])

    def delta(self) -> Tensor:
        """The weight change `scale * up @ down`.

        Returns:
            `[out, in]` or `[out, in, kh, kw]` in float32.
        """
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)  # [out, r] @ [r, in*kh*kw]
        return (self.scale * product).reshape(self.out_features, *self.down.shape[1:])  # [out, in(, kh, kw)]


def _shape_problem(down: Tensor, up: Tensor) -> str | None:
    found = f"down {list(down.shape)} {down.dtype}, up {list(up.shape)} {up.dtype}"
    if not (down.is_floating_point() and up.is_floating_point()) or down.dtype != up.dtype:
        return found
    if down.ndim not in (2, 4) or up.ndim != down.ndim or 0 in down.shape or 0 in up.shape:
        return found
    if up.shape[1] != down.shape[0] or (up.ndim == 4 and tuple(up.shape[2:]) != (1, 1)):
        return found
    return None


def is_site_path(path: str) -> bool:
    """Whether `path` can be the dotted name of a module."""
    return len(path) <= MAX_SITE_PATH and SITE_PATH.fullmatch(path) is not None


def commonest_alpha(factors: Mapping[str, Factors]) -> float:
    """The alpha of most sites; of equally common ones the smallest, so that the sites' order does not matter."""
    return _commonest([float(item.alpha) for item in factors.values()])


def commonest_rank(factors: Mapping[str, Factors]) -> int:
    """The rank of most sites; of equally common ones the smallest."""
    return int(_commonest([item.rank for item in factors.values()]))


def _commonest(values: list[int] | list[float]) -> float:
    counts = Counter(values)
    return max(sorted(counts), key=lambda value: counts[value])
