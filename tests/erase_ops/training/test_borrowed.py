"""What a training borrows comes back as it was."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from torch import nn

from expunge.erase_ops.training.borrowed import evaluating, frozen


@pytest.mark.parametrize("borrow", [evaluating, lambda module: frozen(module, False)], ids=["evaluating", "frozen"])
@pytest.mark.parametrize("whole", [True, False])
def test_each_part_gets_its_own_mode_back(
    borrow: Callable[[nn.Module], AbstractContextManager[None]], whole: bool
) -> None:
    """Trap: `module.train(module.training)` would switch the dropout of a part on that its user had switched off."""
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    module.train(whole)
    module[1].train(not whole)
    module[1][1].bias.requires_grad_(False)
    before = [(part.training, [p.requires_grad for p in part.parameters()]) for part in module.modules()]
    with pytest.raises(KeyboardInterrupt), borrow(module):
        assert not any(part.training for part in module.modules())
        raise KeyboardInterrupt
    assert [(part.training, [p.requires_grad for p in part.parameters()]) for part in module.modules()] == before
