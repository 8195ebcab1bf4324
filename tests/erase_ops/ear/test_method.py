"""What must hold exactly of a window, whatever the model: the published scripts break most of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expunge.erase_ops.ear.config import EARConfig
from expunge.erase_ops.ear.method import EARTraining, left_out
from expunge.erase_ops.ear.pairs import ConceptPair
from expunge.erase_ops.ear.streams import EncodedPairs
from expunge.erase_ops.ear.training import student_of
from expunge.erase_ops.janus.family import JanusFamily
from expunge.erase_ops.training.draws import Draws
from expunge.erase_ops.training.loop import TrainingLoop, make_accelerator
from expunge.errors import NonFiniteError

PAIRS = [
    ConceptPair("a red star on white", "a red ring on white", "star"),
    ConceptPair("a star on black", "a moon on black", "star"),
]
ETA = 0.5


@pytest.fixture(scope="module")
def family(tiny_janus: Callable[..., Any]) -> JanusFamily:
    family = JanusFamily(*tiny_janus())
    family.model.requires_grad_(False)
    return family


def config_of(**fields: Any) -> EARConfig:
    return EARConfig.preset("demo", **{"prompts": PAIRS, "window": 24, "eta": ETA, "threshold": 0.0, **fields})


@pytest.fixture
def method_of(family: JanusFamily) -> Iterator[Callable[..., EARTraining]]:
    """A method on the family with an untrained student, which is taken off again."""
    open_students = []

    def make(modified: list[str] | None = None, **fields: Any) -> EARTraining:
        config = config_of(**fields)
        texts = modified or [pair.modified for pair in config.prompts]
        text = EncodedPairs.of(family, [pair.original for pair in config.prompts], texts, config.retain)
        student = student_of(family, config.sites(4), config)
        open_students.append(student)
        return EARTraining(family, student.__enter__(), text, config)

    yield make
    for student in reversed(open_students):
        student.__exit__(None, None, None)


def draws(seed: int = 0) -> Draws:
    return Draws(torch.Generator().manual_seed(seed))


def windows(method: EARTraining, count: int) -> list[dict[str, Tensor]]:
    given = draws()
    return [method.losses(given) for _ in range(count)]


@pytest.mark.parametrize("kind", ["selected", "lora"])
class TestUntrainedStudent:
    def test_its_loss_is_the_distance_of_the_prompts_states(
        self, method_of: Callable[..., EARTraining], family: JanusFamily, kind: str
    ) -> None:
        """l = (1 + eta)^2 mean |h(c+) - h(c-)|^2 for the prompt's row and 0 for the unconditional one."""
        method = method_of(student=kind)
        found = [losses["erase"].item() for losses in windows(method, 3)]
        assert method.rollout is not None
        tokens = method.rollout.tokens["positive"][:, :-1]
        with torch.no_grad(), method.student.teacher():
            original = family.states(method.text.originals.rows([0]), tokens)
            modified = family.states(method.text.modified.rows([0]), tokens)
        rows = (1 + ETA) ** 2 * (original - modified).double().square().mean(-1)[0] / 2
        assert found == pytest.approx([float(part.sum()) for part in rows.split(24)], rel=1e-4)

    def test_equal_prompts_cost_exactly_nothing(self, method_of: Callable[..., EARTraining], kind: str) -> None:
        method = method_of([pair.original for pair in PAIRS], student=kind, retain=["a moon on white"])
        for losses in windows(method, 6):
            assert losses["erase"].item() == 0.0
            assert losses["retain"].item() == 0.0
            assert "loss" not in losses
            assert float(losses["skipped"]) == 1.0


class TestGradients:
    @pytest.mark.parametrize("space", ["hidden", "logits"])
    def test_queries_and_keys_learn_in_every_window(self, method_of: Callable[..., EARTraining], space: str) -> None:
        """Without the prefix, as published, a sequence has one key, and softmax over one key has no gradient."""
        method = method_of(space=space)
        for losses in windows(method, 3):
            norms = gradient_norms(method, losses["loss"])
            assert min(norms.values()) > 1e-4 * max(norms.values())

    def test_the_stateless_mode_shows_the_published_defects(
        self, method_of: Callable[..., EARTraining], family: JanusFamily
    ) -> None:
        method = method_of(prefix_mode="stateless")
        first, second, _ = windows(method, 3)
        norms = gradient_norms(method, second["loss"])
        queries_keys = [norm for name, norm in norms.items() if "q_proj" in name or "k_proj" in name]
        others = [norm for name, norm in norms.items() if "v_proj" in name or "o_proj" in name]
        assert max(queries_keys) < 1e-6 * min(others)
        assert min(gradient_norms(method, first["loss"]).values()) > 0  # the first token still sees the prompt
        assert method.rollout is not None
        with torch.no_grad():
            states = method._states(method.rollout, "positive", 24, 48)
        assert torch.equal(states[0], states[1])  # conditional and unconditional rows are the same

    def test_the_rows_differ_with_the_prefix(self, method_of: Callable[..., EARTraining]) -> None:
        method = method_of()
        windows(method, 1)
        assert method.rollout is not None
        with torch.no_grad():
            states = method._states(method.rollout, "positive", 24, 48)
        assert (states[0] - states[1]).norm() > 0.01 * states[0].norm()


def gradient_norms(method: EARTraining, loss: Tensor) -> dict[str, float]:
    named = method.parameters()
    gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
    return {name: float(gradient.norm()) for name, gradient in zip(named, gradients, strict=True)}


class TestWindows:
    def test_the_last_shorter_window_is_kept(self, method_of: Callable[..., EARTraining]) -> None:
        """The published scripts compute the last 76 of 576 tokens for a window of 100, and throw them away."""
        method = method_of()
        found = windows(method, 6)
        assert method.windows == 3
        assert method.begun == 2
        assert all("loss" in losses for losses in found)

    def test_model_calls_of_a_prompt(self, method_of: Callable[..., EARTraining], family: JanusFamily) -> None:
        """T to draw, and three a window: at 576 tokens and windows of 48, 612 in the place of 2304."""
        calls: list[int] = []
        handle = family.language_model.register_forward_pre_hook(lambda *_: calls.append(1))
        windows(method_of(window=8), 8)
        handle.remove()
        assert len(calls) == 64 + 3 * 8
        assert (576 + 3 * 12) / (4 * 576) <= 0.30

    def test_quantile_thresholds_skip_their_share(self, method_of: Callable[..., EARTraining]) -> None:
        found = windows(method_of(window=8, threshold_quantile=0.5), 8)
        assert sum("loss" not in losses for losses in found) == 4

    def test_random_skips_are_exactly_their_share(self, method_of: Callable[..., EARTraining]) -> None:
        learnt = [["loss" in losses for losses in windows(method_of(window=4, random_skip=0.3), 32)] for _ in range(2)]
        assert learnt[0] == learnt[1]
        assert sum(learnt[0]) == 32 - round(0.3 * 32)
        assert left_out(0.3, 32, 1).tolist() != left_out(0.3, 32, 0).tolist()

    def test_all_streams_see_the_same_tokens_only_if_aligned(self, method_of: Callable[..., EARTraining]) -> None:
        for mode, same in (("aligned", True), ("independent", False), ("stateless", False)):
            method = method_of(prefix_mode=mode)
            assert all(math.isfinite(float(losses["erase"])) for losses in windows(method, 2))
            assert method.rollout is not None
            tokens = method.rollout.tokens
            assert torch.equal(tokens["positive"], tokens["target"]) is same

    def test_batches_of_pairs_are_taken_in_turn(self, method_of: Callable[..., EARTraining]) -> None:
        method = method_of(prompts=[*PAIRS, PAIRS[0]], batch_size=2, retain=["a moon", "a ring"], retain_per_rollout=3)
        windows(method, 4)
        assert method.rollout is not None
        assert method.rollout.pairs.tolist() == [2, 0]
        assert method.rollout.tokens["retain"].shape == (3, 64)


class Recorder(TorchDispatchMode):
    """The shapes of all tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.shapes += [tuple(one.shape) for one in torch.utils._pytree.tree_leaves(result) if isinstance(one, Tensor)]
        return result


def test_no_logits_of_all_rows_are_ever_made(method_of: Callable[..., EARTraining], family: JanusFamily) -> None:
    method = method_of(space="logits", window=64, batch_size=2)
    method.rollout = method._next_rollout(torch.Generator().manual_seed(0))
    rows = 4 * 64
    with Recorder() as recorder:
        erase = method.erase_window(method.rollout, 0, 64)
        erase.loss.backward()
    of_codes = [math.prod(shape) for shape in recorder.shapes if shape and shape[-1] == family.codes]
    assert of_codes
    assert max(of_codes) < rows * family.codes


class TestLoop:
    def run(self, method: EARTraining, steps: int) -> tuple[TrainingLoop, list[dict[str, float]]]:
        config = method.config.replace(max_train_steps=steps)
        loop = TrainingLoop(method, config, make_accelerator(config, torch.device("cpu")), progress=False)
        return loop, loop.run()

    def test_a_skipped_window_never_touches_the_optimizer(self, method_of: Callable[..., EARTraining]) -> None:
        """Adam's momentum would move the weights after a step of zeros."""
        method = method_of(window=8, threshold_quantile=0.5)
        seen: list[tuple[bool, list[Tensor]]] = []
        weights = list(method.parameters().values())
        config = method.config.replace(max_train_steps=8)
        loop = TrainingLoop(method, config, make_accelerator(config, torch.device("cpu")), progress=False)
        loop.callback = lambda step, metrics: seen.append(("loss" in metrics, [w.detach().clone() for w in weights]))
        before = [weight.detach().clone() for weight in weights]
        loop.run()
        assert {learnt for learnt, _ in seen} == {True, False}
        for learnt, after in seen:
            changed = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert changed is learnt
            before = after
        taken = {int(state["step"]) for state in loop._optimizer.state.values()}
        assert taken == {sum(learnt for learnt, _ in seen)}

    def test_equal_prompts_leave_the_weights_bit_for_bit(self, method_of: Callable[..., EARTraining]) -> None:
        method = method_of([pair.original for pair in PAIRS], threshold=0.05)
        before = {name: weight.detach().clone() for name, weight in method.parameters().items()}
        loop, history = self.run(method, 6)
        assert [step["skipped"] for step in history] == [1.0] * 6
        assert all(torch.equal(weight, before[name]) for name, weight in method.parameters().items())
        assert not loop._optimizer.state

    def test_a_window_that_is_not_finite_raises(self, method_of: Callable[..., EARTraining]) -> None:
        """NaN is not above any threshold: compared plainly, it would be masked."""
        method = method_of(threshold=1e9)
        with torch.no_grad():
            next(iter(method.parameters().values()))[0, 0] = math.nan
        with pytest.raises(NonFiniteError, match="step 1"):
            self.run(method, 3)
