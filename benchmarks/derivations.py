"""The erasers' objectives derived by hand: losses and gradients in numpy's float64, closed forms by another route.

Nothing here calls the code that it is compared with; the tests of the objectives and `trainer_bars.py` both do the
comparison by `gap`, `uce_gap` and `speed_gap`. Outputs are `[B, 2, 3]`, drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from expunge.erase_ops.all_but_one.objective import guidance_swap_loss
from expunge.erase_ops.concept_ablation.objective import model_loss, noise_loss
from expunge.erase_ops.few_shot.objective import ascent_loss
from expunge.erase_ops.speed.objective import null_space, speed_edit
from expunge.erase_ops.training.objectives import guidance_loss
from expunge.erase_ops.uce.objective import uce_edit

Array = NDArray[numpy.float64]
SHAPE = (2, 3)  # of a row's output


@dataclass(frozen=True)
class Case:
    """What an objective is given, and what it should say.

    Args:
        student: outputs of the trained model, by role.
        teacher: those of the frozen one.
        numbers: the step's.
        losses: the expected scalars by name, "loss" among them.
        gradients: of "loss" after each of the student's outputs.
    """

    student: Mapping[str, Array]
    teacher: Mapping[str, Array]
    losses: Mapping[str, float]
    gradients: Mapping[str, Array]
    numbers: Mapping[str, Array] = field(default_factory=dict)


def gap(objective: Callable[..., dict[str, Tensor]], case: Case) -> float:
    """The largest difference of a loss or a gradient's entry, over max(1, |loss|)."""
    student = {role: torch.tensor(array, requires_grad=True) for role, array in case.student.items()}
    teacher, numbers = (
        {name: torch.tensor(array) for name, array in given.items()} for given in (case.teacher, case.numbers)
    )
    found = objective(student, teacher, numbers)
    found["loss"].backward()  # type: ignore[no-untyped-call]
    away = [abs(found[name].item() - expected) for name, expected in case.losses.items()]
    for role, expected in case.gradients.items():
        gradient = student[role].grad
        reached = numpy.zeros_like(expected) if gradient is None else gradient.numpy()
        away.append(float(abs(reached - expected).max()))
    return float(max(away) / max(1.0, abs(case.losses["loss"])))


def _outputs(seed: int, count: int, rows: int) -> Array:
    return numpy.random.default_rng(seed).normal(size=(count, rows, *SHAPE))


def guidance_case(seed: int, rows: int = 3, anchors: int = 4, eta: float = 1.5, weight: float = 10.0) -> Case:
    """Negative guidance with preservation, element by element, eta and lambda drawn up to the given ones.

    y = (1 + eta) n - eta p;  E = sum (s - y)^2 / count;  dE/ds = 2 (s - y) / count;
    P = sum_i w_i mean_j (a - b)_ij^2 / sum_i w_i;  d(lambda P)/da = mean(lambda) 2 w (a - b) / (sum(w) values).
    """
    rng = numpy.random.default_rng(seed)
    s, n, p = rng.normal(size=(3, rows, *SHAPE))
    a, b = rng.normal(size=(2, anchors, *SHAPE))
    etas, lams = eta * rng.uniform(size=rows), weight * rng.uniform(size=rows)
    w = rng.integers(1, 4, anchors).astype(float)
    values = SHAPE[0] * SHAPE[1]
    y = numpy.array([(1 + etas[i]) * n[i] - etas[i] * p[i] for i in range(rows)])
    erase = sum(float(x) ** 2 for x in (s - y).flat) / (rows * values)
    anchor = sum(w[i] * float(x) ** 2 for i in range(anchors) for x in (a[i] - b[i]).flat) / (w.sum() * values)
    lam = sum(lams) / rows
    return Case(
        {"target": s, "anchor": a},
        {"neutral": n, "positive": p, "anchor": b},
        {"loss": erase + lam * anchor, "erase": erase, "anchor": anchor},
        {
            "target": 2 * (s - y) / (rows * values),
            "anchor": lam * 2 * w[:, None, None] * (a - b) / (w.sum() * values),
        },
        {"guidance_scale": etas, "anchor_weight": lams, "anchor_counts": w},
    )


def ablation_case(seed: int, variant: Literal["model", "noise"] = "model") -> Case:
    """L = sum (s - t)^2 / count, t the alternative's prediction or the truth; dL/ds = 2 (s - t) / count."""
    s, t = _outputs(seed, 2, 4)
    loss = sum((x - y) ** 2 for x, y in zip(s.flat, t.flat, strict=True)) / s.size
    given = ({"neutral": t}, {}) if variant == "model" else ({}, {"truth": t})
    return Case({"target": s}, given[0], {"loss": loss, "erase": loss}, {"target": 2 * (s - t) / s.size}, given[1])


def swap_case(seed: int, base: str = "student", weight: float = 0.7) -> Case:
    """L = mean ((c - z) - (a - v))^2 + kappa mean (u - v)^2, z = v for base "teacher", else u; its gradient or not."""
    c, u, a, v = _outputs(seed, 4, 3)
    swap = hold = 0.0
    for i in numpy.ndindex(c.shape):
        swap += ((c[i] - (v if base == "teacher" else u)[i]) - (a[i] - v[i])) ** 2 / c.size
        hold += (u[i] - v[i]) ** 2 / c.size
    to_c = 2 * ((c - (v if base == "teacher" else u)) - (a - v)) / c.size
    to_u = weight * 2 * (u - v) / c.size - (to_c if base == "student" else 0)
    return Case(
        {"target": c, "unconditional": u},
        {"neutral": a, "unconditional": v},
        {"loss": swap + weight * hold, "erase": swap, "unconditional": hold},
        {"target": to_c, "unconditional": to_u},
    )


def ascent_case(seed: int, bound: float | None = None, rows: int = 5) -> Case:
    """L = -mean over rows of min(e, bound), e a row's mean square of s - y; rows beyond the bound get no gradient."""
    s, y = _outputs(seed, 2, rows)
    values = SHAPE[0] * SHAPE[1]
    errors = [sum(float(x) ** 2 for x in (s[i] - y[i]).flat) / values for i in range(rows)]
    counted = [bound is None or error < bound for error in errors]
    loss = -sum(error if inside else bound or 0.0 for error, inside in zip(errors, counted, strict=True)) / rows
    gradient = -2 * (s - y) / (rows * values) * numpy.array(counted, dtype=float)[:, None, None]
    losses = {"loss": loss, "error": sum(errors) / rows}
    return Case({"target": s}, {}, losses, {"target": gradient}, {"truth": y})


# ------------------------------------------------------------------------------------------------------- closed forms


def rows_of(n: int, d: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """`[n, d]` float64, standard normal; of a rank if one is given."""
    generator = torch.Generator().manual_seed(seed)
    draw: Any = partial(torch.randn, dtype=torch.float64, generator=generator)
    left = draw(n, d if rank is None else rank)
    return left if rank is None else left @ draw(rank, d)


def uce_gap(
    n: int = 20, m: int = 30, d: int = 16, seed: int = 0, scales: tuple[float, float, float] = (1.3, 0.7, 0.5)
) -> float:
    """UCE's edit against the stacked least-squares system, solved by orthogonal factorisation: no normal equations."""
    erase, guide, preserve = rows_of(n, d, seed), rows_of(n, d, seed + 1), rows_of(m, d, seed + 2)
    one, two, ridge = (number**0.5 for number in scales)
    left = torch.cat([one * erase, two * preserve, ridge * torch.eye(d, dtype=torch.float64)])
    right = torch.cat([one * (guide - erase), torch.zeros(m + d, d, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(left, right, driver="gelsy").solution.T
    found = uce_edit(erase, guide, preserve, erase_scale=scales[0], preserve_scale=scales[1], ridge=scales[2])
    return float((found - wanted).abs().max())


def speed_gap(d: int = 24, seed: int = 0) -> float:
    """SPEED's edit against its published form, and its constraint.

    Delta = W (G C^T - C C^T) P Q M: P the null space's projector, Q = I - M F (F^T P M F)^-1 F^T P.
    """
    erase, guide, kept, fixed = (
        rows_of(10, d, seed), rows_of(10, d, seed + 1), rows_of(40, d, seed + 2, rank=8), rows_of(3, d, seed + 3),
    )  # fmt: skip
    eye = torch.eye(d, dtype=torch.float64)
    basis = null_space(kept, torch.zeros(0, d, dtype=torch.float64), 1e-10)
    projector = basis @ basis.T
    c, g, f = erase.T, guide.T, fixed.T
    m = torch.linalg.inv(c @ c.T @ projector + eye)
    q = eye - m @ f @ torch.linalg.inv(f.T @ projector @ m @ f) @ f.T @ projector
    published = (g @ c.T - c @ c.T) @ projector @ q @ m
    found = speed_edit(erase, guide, null_space(kept, fixed, 1e-10), ridge=1.0)
    return float(max((found - published).abs().max(), (found @ f).abs().max()))


def _swap(base: Any) -> Callable[..., dict[str, Tensor]]:
    return partial(guidance_swap_loss, unconditional_weight=0.7, base=base)


# What stands in the table: each objective, and how far it is from its derivation at a seed.
GAPS: dict[str, Callable[[int], float]] = {
    "negative guidance (spm, esd, co_erasing)": lambda seed: gap(guidance_loss, guidance_case(seed)),
    "concept ablation": lambda seed: max(
        gap(model_loss, ablation_case(seed)), gap(noise_loss, ablation_case(seed, "noise"))
    ),
    "all but one": lambda seed: max(
        gap(_swap(base), swap_case(seed, base)) for base in ("student", "student_detached", "teacher")
    ),
    "few-shot": lambda seed: max(
        gap(partial(ascent_loss, bound=bound), ascent_case(seed, bound)) for bound in (None, 2.0)
    ),
    "UCE": lambda seed: uce_gap(seed=seed),
    "SPEED": lambda seed: speed_gap(seed=seed),
}
