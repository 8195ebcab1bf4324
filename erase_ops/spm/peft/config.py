"""Configuration of the SPM tuner, in PEFT's style."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from expunge.errors import InvalidInputError

METHOD = "SPM"


@dataclass
class SPMConfig(PeftConfig):
    """Configuration of SPM adapters (arXiv 2312.16145) for `peft.get_peft_model`.

    As a PEFT adapter an SPM is not gated: it acts on every input at full strength. `expunge.erase` gates.

    Args:
        r: rank.
        alpha: the delta is scaled by alpha / r.
        target_modules: names or ends of names of the layers, or a regular expression; None for the layers that
            `coverage` names in a diffusers denoiser.
        exclude_modules: names or ends of names to leave out, or a regular expression.
        coverage: a preset of `expunge.erase_ops.sites`; used where target_modules is None.
        rank_pattern: ranks of layers that differ, by name or end of name.
        alpha_pattern: alphas of layers that differ.
        init_weights: start as the identity (up at zero); False draws both factors, for tests.
        concepts: what the adapter erases; kept with the file.
        neutral: the prompt that they are erased towards.

    Raises:
        InvalidInputError: if a rank is below 1 or an alpha not above 0.
    """

    r: int = field(default=1, metadata={"help": "Rank of the adapters."})
    alpha: float = field(default=1.0, metadata={"help": "The delta is scaled by alpha / r."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, ends of names or a regular expression; None: see coverage."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, ends of names or a regular expression to leave out."}
    )
    coverage: str = field(default="all", metadata={"help": "Preset of layers where target_modules is None."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks that differ, by name."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Alphas that differ, by name."})
    init_weights: bool = field(default=True, metadata={"help": "Start as the identity."})
    concepts: list[str] = field(default_factory=list, metadata={"help": "What the adapter erases."})
    neutral: str = field(default="", metadata={"help": "The prompt that the concepts are erased towards."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = METHOD
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise InvalidInputError(
                    f"SPMConfig: {name}", expected="a rank of at least 1", found=repr(rank), fix="Use a whole number."
                )
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not math.isfinite(alpha) or alpha <= 0:
                raise InvalidInputError(
                    f"SPMConfig: {name}", expected="an alpha above 0", found=repr(alpha), fix="1.0 is the usual one."
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields; sets, which PEFT puts in place of long lists of modules, in a fixed order."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}
