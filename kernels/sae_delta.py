"""Takes erased features out of hidden states, and nothing else.

Formula (Interpret-then-Deactivate, arXiv 2503.09446, as a difference; strengths are what activations are multiplied
by):

    x' = x - Σ_{j : a[t, j] != 0} (1 - s_j) a[t, j] d_j

which is x + (decode of the edited activations) - (decode of the plain ones): the reconstruction's error and every other
feature stay in x. Where no erased feature is active x' has the bits of x.

Shapes:
    x        [*, d]   hidden states
    acts     [*, m]   activations of the erased features (`sae_rank_count` makes them), 0 where not active
    w_dec    [m, d]   their decoder rows, or [h, d] with features [m], which says which rows they are; any strides
    s        [m] or one number: 0 takes a feature out, 1 leaves it, a negative strength pushes the other way

Sums are float32 and rounded once to the dtype of x. Only decoder rows of features that fire are read.
The CPU multiplies the tokens and features that fire, and copies the rest.

Gradient: to x, acts, w_dec and s (x' is linear in the activations, so that acts have a gradient where they are 0 too).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expunge.errors import InvalidInputError
from expunge.kernels.dispatch import kernel_path
from expunge.kernels.sae_encoder import check_ids, no_autocast


def sae_delta_reference(x: Tensor, amount: Tensor, w_dec: Tensor, features: Tensor | None = None) -> Tensor:
    """The formula, word for word, with amount = (1 - s) a."""
    rows = w_dec if features is None else w_dec[features]
    compute = torch.promote_types(x.dtype, torch.float32)
    edited = (x.to(compute) - amount.to(compute) @ rows.to(compute)).to(x.dtype)
    return torch.where((amount != 0).any(-1, keepdim=True), edited, x)


def delta_of_fired(x: Tensor, amount: Tensor, w_dec: Tensor, features: Tensor | None) -> Tensor:
    """The same for the tokens and features that fire, a copy of the rest: x [T, d], amount [T, m]."""
    out = x.clone(memory_format=torch.contiguous_format)
    fired = amount != 0
    tokens, columns = fired.any(1).nonzero()[:, 0], fired.any(0).nonzero()[:, 0]
    if tokens.numel() == 0:
        return out
    rows = w_dec[columns if features is None else features[columns]].to(amount.dtype)
    edited = torch.addmm(x[tokens].to(amount.dtype), amount[tokens[:, None], columns], rows, alpha=-1)
    out[tokens] = edited.to(x.dtype)
    return out


def _delta_by_path(x: Tensor, amount: Tensor, w_dec: Tensor, features: Tensor | None) -> Tensor:
    """x [T, d], amount [T, m], by the path that the dispatch names."""
    if features is not None:
        check_ids("sae_delta", "features", features, w_dec.shape[0])
    run = delta_of_fired
    if kernel_path("sae_delta", x, amount, w_dec) != "torch":
        from expunge.kernels.gpu.sae_delta import launch_sae_delta_forward as run
    with no_autocast(x):
        return run(x, amount, w_dec, features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    amount, w_dec, features = ctx.saved_tensors
    g = grads[0].to(amount.dtype)
    d_amount = d_rows = None
    with no_autocast(g):
        if ctx.needs_input_grad[1]:
            d_amount = -(g @ (w_dec if features is None else w_dec[features]).to(amount.dtype).mT)
        if ctx.needs_input_grad[2]:
            d_rows = -(amount.mT @ g).to(w_dec.dtype)  # [m, T] @ [T, d]
            d_rows = d_rows if features is None else torch.zeros_like(w_dec).index_copy(0, features, d_rows)
    return grads[0] if ctx.needs_input_grad[0] else None, d_amount, d_rows, None


class _Delta(torch.autograd.Function):
    forward = staticmethod(_delta_by_path)
    setup_context = staticmethod(_setup)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return _backward(ctx, *grads)


# What torch.compile sees: how many tokens fire depends on the data, which would break a graph.
_op = torch.library.custom_op("expunge::sae_delta", _delta_by_path, mutates_args=())
_op.register_autograd(_backward, setup_context=_setup)


@_op.register_fake
def _(x: Tensor, amount: Tensor, w_dec: Tensor, features: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def sae_delta(
    x: Tensor, acts: Tensor, w_dec: Tensor, *, features: Tensor | None = None, strength: float | Tensor = 0.0
) -> Tensor:
    """Hidden states without the erased features.

    Args:
        x: `[*, d]`, hidden states; float32, float16, bfloat16 or float64.
        acts: `[*, m]`, the activations of the erased features, 0 where one is not active.
        w_dec: `[m, d]`, their decoder rows; or the whole decoder `[h, d]`, with `features`.
        features: `[m]`, distinct ids, int64: rows of w_dec.
        strength: what the activations are multiplied by, one number or `[m]`.

    Returns:
        `[*, d]`, a new tensor in the dtype of x; tokens where nothing fires have the bits that they had.

    Raises:
        InvalidInputError: if shapes, dtypes, devices or ids do not fit.
    """
    check_delta(x, acts, w_dec, features, strength)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    amount = acts.to(compute) * (1 - strength)  # [*, m]
    call = _op if torch.compiler.is_compiling() else _Delta.apply
    rows = x.reshape(-1, x.shape[-1])  # [*, d] -> [T, d]
    out: Tensor = call(rows, amount.reshape(rows.shape[0], acts.shape[-1]), w_dec, features)
    return out.view(x.shape)


def check_delta(x: Tensor, acts: Tensor, w_dec: Tensor, features: Tensor | None, strength: float | Tensor) -> None:
    """Refuses arguments that do not belong together.

    Raises:
        InvalidInputError: as `sae_delta` says.
    """
    m = acts.shape[-1] if acts.ndim else -1
    count = w_dec.shape[0] if features is None else features.shape[0] if features.ndim else -1
    if acts.shape[:-1] != x.shape[:-1] or w_dec.ndim != 2 or w_dec.shape[1] != x.shape[-1] or count != m:
        raise InvalidInputError(
            "sae_delta",
            expected="x [*, d], acts [*, m] and w_dec [m, d], or w_dec [h, d] with features [m]",
            found=f"x {list(x.shape)}, acts {list(acts.shape)}, w_dec {list(w_dec.shape)}, features "
            f"{None if features is None else list(features.shape)}",
            fix="Decoders stored as [d, h] (torch.nn.Linear) are passed as w_dec.T, which needs no copy.",
        )
    for name, tensor in (("x", x), ("acts", acts), ("w_dec", w_dec)):
        if not tensor.is_floating_point() or tensor.device != x.device:
            raise InvalidInputError(
                f"sae_delta: {name}",
                expected=f"numbers with a fraction on {x.device}",
                found=f"{tensor.dtype} on {tensor.device}",
                fix="Dequantise weights first, and keep the autoencoder on the device of the hidden states.",
            )
    if isinstance(strength, Tensor) and strength.shape not in ((), (m,)):
        raise InvalidInputError(
            "sae_delta: strength",
            expected=f"one number, or one for each of {m} features",
            found=f"shape {list(strength.shape)}",
            fix="Repeat each concept's strength for its features.",
        )
    if features is not None:
        check_ids("sae_delta", "features", features, w_dec.shape[0])
