"""Denoiser calls through the entry: the path they take, when gates are decided anew, threads, force, gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from expunge.erase_ops import entry, merge
from expunge.erase_ops.attach import Attachment, attach, detach
from expunge.erase_ops.entry import CallInfo
from expunge.erase_ops.merge import Mode, Route
from expunge.erase_ops.spm import SPMAdapter
from expunge.errors import ErasureLostError, InvalidInputError, NonFiniteError

CAT, DOG, OTHER = 0, 1, 2


@pytest.fixture
def prompts() -> Tensor:
    """Text states `[3, 7, 32]` of two concepts and of something else, all orthogonal to each other."""
    states = torch.zeros(3, 7, 32)
    for index in range(3):
        states[index, :, index * 10 : index * 10 + 10] = torch.randn(7, 10)
    return states


@pytest.fixture
def attachment(
    unet: UNet2DConditionModel, prompts: Tensor, random_adapter: Callable[..., SPMAdapter]
) -> Iterator[Attachment]:
    adapters = [random_adapter(unet, seed=i, states=prompts[i : i + 1], threshold=0.5) for i in (CAT, DOG)]
    yield attach(unet, adapters)


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> list[Route]:
    """Every route that is planned, in order."""
    planned: list[Route] = []
    plan = entry.plan

    def spy(*args: object, **kwargs: object) -> Route:
        planned.append(plan(*args, **kwargs))  # type: ignore[arg-type]
        return planned[-1]

    monkeypatch.setattr(entry, "plan", spy)
    return planned


@torch.no_grad()
def predict(unet: UNet2DConditionModel, states: Tensor, seed: int = 0) -> Tensor:
    sample = torch.randn(len(states), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    return unet(sample, 500, encoder_hidden_states=states).sample


def base_of(unet: UNet2DConditionModel, states: Tensor, seed: int = 0) -> Tensor:
    attachment = entry_of(unet)
    with attachment.force(0.0):
        return predict(unet, states, seed)


def entry_of(unet: UNet2DConditionModel) -> Attachment:
    from expunge.erase_ops.attach import attachment_of

    attachment = attachment_of(unet)
    assert attachment is not None
    return attachment


def test_gates_below_the_threshold_run_the_base_model_bit_for_bit(
    unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor, routes: list[Route]
) -> None:
    states = prompts[[OTHER, OTHER]]
    bare = predict(unet, states)
    with attachment.call(CallInfo(1, has_negative=True)):
        inside = predict(unet, states)
    assert [route.mode for route in routes] == [Mode.BASE, Mode.BASE]
    detach(unet)
    assert torch.equal(bare, predict(unet, states)) and torch.equal(inside, bare)


def test_one_prompt_is_merged_once_a_call(
    unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor, routes: list[Route]
) -> None:
    states = prompts[[OTHER, CAT]]
    weights = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    with attachment.call(CallInfo(1, has_negative=True)) as call:
        steps = [predict(unet, states, seed) for seed in range(3)]
    assert [route.mode for route in routes] == [Mode.MERGED]
    assert len(call.records) == 1 and call.records[0].gates.tolist() == [[1.0, 0.0]] * 2
    assert all(torch.equal(weights[name], parameter) for name, parameter in unet.named_parameters())
    with attachment.force([1.0, 0.0]):
        for seed, step in enumerate(steps):
            torch.testing.assert_close(predict(unet, states, seed), step, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(steps[0], base_of(unet, states), atol=1e-2)


def test_mixed_rows_equal_single_ones(
    unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor, routes: list[Route]
) -> None:
    states = prompts[[OTHER, OTHER, OTHER, CAT, DOG, OTHER]]
    with attachment.call(CallInfo(3, has_negative=True)) as call:
        mixed = predict(unet, states)
    assert routes[-1].mode is Mode.LOWRANK
    assert call.records[-1].gates.tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]] * 2
    for row, gates in enumerate(call.records[-1].gates):
        with attachment.force(gates):
            single = predict_row(unet, states, row)
        torch.testing.assert_close(mixed[row : row + 1], single, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def predict_row(unet: UNet2DConditionModel, states: Tensor, row: int) -> Tensor:
    sample = torch.randn(len(states), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return unet(sample[row : row + 1], 500, states[row : row + 1]).sample


def test_bare_calls_gate_every_row_and_never_merge(
    unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor, routes: list[Route]
) -> None:
    predict(unet, prompts[[CAT, CAT]])
    predict(unet, prompts[[CAT, OTHER]])
    assert [route.mode for route in routes] == [Mode.LOWRANK, Mode.LOWRANK]
    assert attachment.last is not None and attachment.last.gates.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_swapped_and_overwritten_states_are_decided_anew(
    unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor, routes: list[Route]
) -> None:
    states = prompts[[OTHER]].clone()
    with attachment.call(CallInfo(1, token_ids=[set()], states=states)) as call:
        predict(unet, states)
        predict(unet, prompts[[CAT]])  # a callback put other states in place
        states.copy_(prompts[[DOG]])  # or wrote into the same tensor
        predict(unet, states)
        predict(unet, states)
    assert [record.gates.tolist() for record in call.records] == [[[0.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]]
    assert len(routes) == 3


def test_inference_tensors_are_looked_at_every_time(
    unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor, routes: list[Route]
) -> None:
    with torch.inference_mode(), attachment.call(CallInfo(1)) as call:
        states = prompts[[OTHER]] * 1.0
        predict(unet, states)
        states.copy_(prompts[[CAT]])  # leaves no trace: inference tensors have no version
        first = predict(unet, states)
        second = predict(unet, states)
    assert [record.gates.tolist() for record in call.records] == [[[0.0, 0.0]], [[1.0, 0.0]]]
    assert [route.mode for route in routes] == [Mode.BASE, Mode.MERGED], "equal gates are merged once all the same"
    assert torch.equal(first, second)


def test_separate_guidance_calls_keep_their_gates(
    unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor, routes: list[Route]
) -> None:
    negative, positive = prompts[[OTHER]], prompts[[CAT]]
    with attachment.call(CallInfo(1, has_negative=True)):
        for _ in range(3):
            predict(unet, negative)
            predict(unet, positive)
    assert [route.mode for route in routes] == [Mode.BASE, Mode.MERGED]


def test_only_one_merged_copy_is_kept(unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor) -> None:
    with attachment.call(CallInfo(1)) as call:
        for index in (CAT, DOG, CAT):
            predict(unet, prompts[[index]])
            assert sum(route.mode is Mode.MERGED for route in call.routes.values()) == 1


@pytest.mark.parametrize("arrives", [True, False])
def test_weights_that_are_offloaded_are_merged_once_they_have_arrived(
    unet: UNet2DConditionModel,
    attachment: Attachment,
    prompts: Tensor,
    routes: list[Route],
    monkeypatch: pytest.MonkeyPatch,
    arrives: bool,
) -> None:
    # Model offloading brings the weights in during the first denoiser call; sequential offloading never keeps them.
    monkeypatch.setattr(merge, "is_mergeable", lambda carrier, device: arrives and len(routes) > 0)
    with attachment.call(CallInfo(1)):
        steps = [predict(unet, prompts[[CAT]]) for _ in range(4)]
    assert [all(work.weight is None for work in route.work) for route in routes] == [True, not arrives]
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0], atol=1e-5, rtol=1e-5)


def test_states_by_position_and_by_keyword(unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor) -> None:
    sample = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        a = unet(sample, 500, prompts[[CAT]]).sample
        b = unet(sample=sample, timestep=500, encoder_hidden_states=prompts[[CAT]], return_dict=False)[0]
    assert torch.equal(a, b)
    with pytest.raises(InvalidInputError, match="text states"):
        unet(sample, 500, None)


def test_an_exception_leaves_nothing_behind(
    unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor
) -> None:
    with pytest.raises(RuntimeError):
        unet(torch.randn(1, 3, 16, 16), 500, prompts[[CAT]])
    assert all(carrier.slot.work is carrier.running.work is None for carrier in attachment.carriers)
    with pytest.raises(NonFiniteError):
        unet(torch.randn(1, 4, 16, 16), 500, prompts[[CAT]] * float("nan"))
    with pytest.raises(ErasureLostError):
        attachment.carriers[0](torch.randn(1, 32, 4, 4))
    predict(unet, prompts[[CAT]])


def test_an_interrupt_leaves_nothing_behind(
    unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = unet.mid_block.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), attachment.call(CallInfo(1)):
        predict(unet, prompts[[CAT]])
    handle.remove()
    assert all(carrier.slot.work is carrier.running.work is None for carrier in attachment.carriers)


def test_a_later_pre_hook_that_swaps_the_states_is_caught_then_followed(
    unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor
) -> None:
    def swap(module: object, args: object, kwargs: dict[str, object]) -> tuple[object, dict[str, object]]:
        return args, kwargs | {"encoder_hidden_states": prompts[[CAT]]}

    unet.register_forward_pre_hook(swap, with_kwargs=True)
    attachment.check(unet)  # as a pipeline does before each call: the gate moves behind the new hook
    predict(unet, prompts[[OTHER]])
    assert attachment.last is not None and attachment.last.gates.tolist() == [[1.0, 0.0]]
    unet.register_forward_pre_hook(lambda m, a, k: swap(m, a, k), with_kwargs=True)
    with pytest.raises(ErasureLostError, match="pre-hook"):
        predict(unet, prompts[[OTHER]])
    predict(unet, prompts[[OTHER]])
    assert attachment.last.gates.tolist() == [[1.0, 0.0]]


def test_threads_get_what_they_get_alone(unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor) -> None:
    def pipeline_call(which: int) -> list[Tensor]:
        with attachment.call(CallInfo(1, has_negative=True)) as call:
            images = [predict(unet, prompts[[OTHER, which]], seed) for seed in range(6)]
        assert call.records[-1].gates[1].tolist() == [float(which == CAT), float(which == DOG)]
        return images

    kinds = [CAT, DOG, OTHER, CAT, DOG]
    alone = [pipeline_call(which) for which in kinds]
    start = threading.Barrier(len(kinds))

    def run(which: int) -> list[Tensor]:
        torch.set_grad_enabled(False)
        start.wait()
        return pipeline_call(which)

    with ThreadPoolExecutor(len(kinds)) as pool:
        together = list(pool.map(run, kinds))
    assert all(torch.equal(a, b) for x, y in zip(alone, together, strict=True) for a, b in zip(x, y, strict=True))


def test_a_call_belongs_to_its_thread(unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor) -> None:
    def other_thread() -> list[list[float]]:
        predict(unet, prompts[[CAT, OTHER]])
        assert attachment.last is not None
        return attachment.last.gates.tolist()

    with attachment.force(0.0), ThreadPoolExecutor(1) as pool:
        assert pool.submit(other_thread).result() == [[1.0, 0.0], [0.0, 0.0]]


def test_forced_gates(unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor, routes: list[Route]) -> None:
    states = prompts[[OTHER, OTHER]]
    with attachment.force([[1.0, 0.0], [0.0, 0.0]]):  # type: ignore[arg-type]
        rows = predict(unet, states)
    with attachment.force(torch.tensor([1.0, 0.0])):
        both = predict(unet, states)
    base = base_of(unet, states)
    torch.testing.assert_close(rows[0], both[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(rows[1], base[1])
    assert [route.mode for route in routes] == [Mode.LOWRANK, Mode.LOWRANK, Mode.BASE]
    assert attachment.last is not None and attachment.last.sources == (("off", "off"),) * 2
    with attachment.call(CallInfo(2)), attachment.force(1.0):
        predict(unet, states)
    assert attachment.last.sources == (("forced", "forced"),) * 2


@pytest.mark.parametrize("gates", [[1.0], [[1.0, 0.0, 0.0]], torch.ones(1, 1, 2)])
def test_forced_gates_of_another_shape(attachment: Attachment, gates: object) -> None:
    with pytest.raises(InvalidInputError, match="gates"), attachment.force(gates):  # type: ignore[arg-type]
        pass


def test_forced_gates_must_be_finite(attachment: Attachment) -> None:
    with pytest.raises(NonFiniteError), attachment.force(float("nan")):
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_factors_gates_and_input(
    unet: UNet2DConditionModel,
    prompts: Tensor,
    random_adapter: Callable[..., SPMAdapter],
    checkpointing: bool,
) -> None:
    def gradients() -> list[Tensor]:
        adapter = random_adapter(unet, rank=2, states=prompts[:1])
        leaves = [t.requires_grad_() for f in adapter.factors.values() for t in (f.down, f.up)]
        attachment = attach(unet, [adapter], trainable=True)
        gates = torch.tensor([[0.7], [0.2]], requires_grad=True)
        sample = torch.ones(2, 4, 16, 16, requires_grad=True)
        unet.train()
        with attachment.force(gates):
            loss = unet(sample, 500, prompts[:2]).sample.square().mean()
        with attachment.force(0.0), torch.no_grad():
            unet(sample, 500, prompts[:2])  # a teacher's call between forward and backward
        loss.backward()
        assert all(carrier.slot.work is carrier.running.work is None for carrier in attachment.carriers)
        detach(unet)
        return [leaf.grad for leaf in (*leaves, gates, sample)]  # type: ignore[misc]

    unet.requires_grad_(False)
    plain = gradients()
    assert all(gradient is not None and gradient.any() for gradient in plain)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        for expected, found in zip(plain, gradients(), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_checkpointing_keeps_each_calls_own_gates(
    unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor
) -> None:
    def gradient() -> Tensor:
        sample = torch.ones(1, 4, 16, 16, requires_grad=True)
        first = unet(sample, 500, prompts[[CAT]]).sample
        second = unet(first, 400, prompts[[OTHER]]).sample
        third = unet(sample, 300, prompts[[DOG]]).sample
        (second * third).mean().backward()
        assert sample.grad is not None
        return sample.grad

    unet.requires_grad_(False).train()
    plain = gradient()
    unet.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), plain, atol=1e-6, rtol=1e-4)


def test_with_gradients_nothing_is_merged(
    unet: UNet2DConditionModel, attachment: Attachment, prompts: Tensor, routes: list[Route]
) -> None:
    states = prompts[[CAT]].clone().requires_grad_()
    with attachment.call(CallInfo(1)):
        unet(torch.randn(1, 4, 16, 16), 500, states).sample.sum().backward()
    assert states.grad is not None and states.grad.any()
    assert routes[-1].mode is Mode.LOWRANK


def test_attached_under_inference_mode_can_be_differentiated(
    unet: UNet2DConditionModel, prompts: Tensor, random_adapter: Callable[..., SPMAdapter]
) -> None:
    with torch.inference_mode():
        attach(unet, [random_adapter(unet, states=prompts[:1])])
    sample = torch.randn(1, 4, 16, 16, requires_grad=True)
    unet(sample, 500, prompts[[CAT]]).sample.sum().backward()
    assert sample.grad is not None


def test_sites_counts_what_is_carried(unet: UNet2DConditionModel, attachment: Attachment) -> None:
    assert attachment.sites(unet) == (48, 48)
    unet.mid_block.attentions[0].proj_in = attachment.originals["mid_block.attentions.0.proj_in"]
    assert attachment.sites(unet) == (47, 48)
    assert attachment.sites(UNet2DConditionModel.from_config(unet.config)) == (0, 48)
