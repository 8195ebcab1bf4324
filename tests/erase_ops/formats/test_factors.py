"""Factors: their shapes, scale and weight change."""

import pytest
import torch

from expunge.erase_ops.formats.factors import Factors, commonest_alpha, commonest_rank, is_site_path
from expunge.errors import InvalidInputError


def test_factors_know_their_delta() -> None:
    linear = Factors(torch.randn(2, 3), torch.randn(4, 2), alpha=3.0)
    torch.testing.assert_close(linear.delta(), 1.5 * linear.up @ linear.down)
    conv = Factors(torch.randn(2, 3, 3, 5), torch.randn(4, 2, 1, 1), alpha=1.0)
    x = torch.randn(1, 3, 9, 9)
    one_step = torch.nn.functional.conv2d(x, conv.delta())
    two_steps = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, conv.down), conv.up) * conv.scale
    torch.testing.assert_close(one_step, two_steps, atol=1e-5, rtol=1e-5)
    assert (conv.rank, conv.in_features, conv.out_features, conv.is_conv, linear.is_conv) == (2, 3, 4, True, False)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (torch.ones(2, 3), torch.ones(4, 1)),
        (torch.ones(2, 3), torch.ones(4, 2, 1, 1)),
        (torch.ones(2, 3, 1, 1), torch.ones(4, 2, 3, 3)),
        (torch.ones(0, 3), torch.ones(4, 0)),
        (torch.ones(3), torch.ones(4)),
        (torch.ones(1, 3, 3), torch.ones(4, 1, 1)),
        (torch.ones(2, 3), torch.ones(4, 2).half()),
        (torch.ones(2, 3).long(), torch.ones(4, 2).long()),
    ],
)
def test_factors_that_do_not_belong_together(down: torch.Tensor, up: torch.Tensor) -> None:
    with pytest.raises(InvalidInputError, match="down"):
        Factors(down, up)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_is_a_number_above_zero(alpha: float) -> None:
    with pytest.raises(InvalidInputError, match="alpha"):
        Factors(torch.ones(1, 2), torch.ones(2, 1), alpha)


def test_the_commonest_does_not_depend_on_order() -> None:
    def sites(*pairs: tuple[int, float]) -> dict[str, Factors]:
        return {f"a.{i}": Factors(torch.ones(r, 2), torch.ones(2, r), alpha) for i, (r, alpha) in enumerate(pairs)}

    assert commonest_rank(sites((2, 1.0), (2, 3.0), (1, 3.0))) == 2
    assert commonest_alpha(sites((2, 1.0), (2, 3.0), (1, 3.0))) == 3.0
    assert commonest_alpha(sites((1, 1.0), (1, 3.0))) == commonest_alpha(sites((1, 3.0), (1, 1.0))) == 1.0


def test_site_paths() -> None:
    assert is_site_path("down_blocks.0.attentions.1.to_out.0")
    for text in ("", ".", "a.", ".a", "a..b", "../x", "a/b", "0.a", "a b", "ä", "a\n", "a" * 300):
        assert not is_site_path(text)
