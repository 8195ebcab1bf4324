"""Selected parameters: the student stands in the module, the teacher is the module's own weights, both in one model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from trainer_checks import teacher_bytes

from expunge.erase_ops.training.student import ParameterStudent

Inputs = tuple[Tensor, Tensor, Tensor]


def run(unet: nn.Module, inputs: Inputs) -> Tensor:
    output: Tensor = unet(*inputs, return_dict=False)[0]
    return output


def change(student: ParameterStudent) -> None:
    with torch.no_grad():
        for parameter in student.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape))


def test_student_and_teacher_share_one_model(unet: UNet2DConditionModel, inputs: Inputs) -> None:
    objects = {name: id(parameter) for name, parameter in unet.named_parameters()}
    with torch.no_grad():
        base = run(unet, inputs)
        with ParameterStudent.of(unet, "esd-x").installed() as student:
            assert torch.equal(run(unet, inputs), base)  # untrained
            change(student)
            trained = run(unet, inputs)
            with student.teacher():
                assert torch.equal(run(unet, inputs), base)
            assert torch.equal(run(unet, inputs), trained) and not torch.equal(trained, base)
        assert torch.equal(run(unet, inputs), base)
    assert {name: id(parameter) for name, parameter in unet.named_parameters()} == objects


def test_results_are_what_the_student_computed_with(unet: UNet2DConditionModel, inputs: Inputs) -> None:
    with torch.no_grad():
        with ParameterStudent.of(unet, "esd-x-strict").installed() as student:
            change(student)
            trained, values = run(unet, inputs), student.result()
        unet.load_state_dict(values, strict=False)
        assert torch.equal(run(unet, inputs), trained)


def test_gradients_reach_the_student_alone(unet: UNet2DConditionModel, inputs: Inputs) -> None:
    unet.requires_grad_(False)
    with ParameterStudent.of(unet, "esd-x").installed() as student:
        with torch.no_grad(), student.teacher():
            target = run(unet, inputs) + 1
        with student.student():
            (run(unet, inputs) - target).square().mean().backward()
        assert all(parameter.grad is not None for parameter in student.parameters().values())
    assert all(parameter.grad is None for parameter in unet.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_recomputes_the_student(unet: UNet2DConditionModel, inputs: Inputs, dtype: torch.dtype) -> None:
    unet.requires_grad_(False).to(dtype)
    sample, timestep, states = inputs
    given = (sample.to(dtype), timestep, states.to(dtype))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with ParameterStudent.of(unet, "esd-x").installed() as student:
            torch.manual_seed(1)
            change(student)
            with torch.no_grad(), student.teacher():
                run(unet, given)
            with student.student():
                run(unet, given).float().square().mean().backward()
            gradients.append([parameter.grad for parameter in student.parameters().values()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and plain.dtype == torch.float32
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


def test_a_half_precision_model_has_float32_masters(unet: UNet2DConditionModel, inputs: Inputs) -> None:
    """A step of 1e-5 is lost in bfloat16 weights of size 0.1; the masters keep it."""
    unet.to(torch.bfloat16)
    with ParameterStudent.of(unet, "esd-x-strict").installed() as student:
        name, master = next(iter(student.parameters().items()))
        before = master.detach().clone()
        with torch.no_grad():
            master.add_(1e-5)
        assert master.dtype == torch.float32 and bool((master != before).all())
        with student.student():
            placed = unet.get_submodule(name.rpartition(".")[0])._parameters["weight"]
            assert placed is not None and placed.dtype == torch.bfloat16
        assert all(value.dtype == torch.float32 for value in student.result().values())


def test_tied_parameters_change_together() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    x = torch.randn(2, 3)
    with torch.no_grad(), ParameterStudent(module, ["0.weight"]).installed() as student:
        student.parameters()["0.weight"].copy_(torch.eye(3))
        assert torch.equal(module(x), x)
    assert module[1].weight is module[0].weight


@pytest.mark.parametrize("selection", ["esd-x", "full"])
def test_the_teacher_costs_the_trained_parameters_only(
    unet: UNet2DConditionModel, inputs: Inputs, selection: str
) -> None:
    extra, trained = teacher_bytes(unet, selection, lambda: run(unet, inputs))
    assert 0 < extra <= trained


def test_errors_leave_the_module_as_it_was(tiny_sd: Callable[..., Any]) -> None:
    unet = tiny_sd().unet
    objects = [id(parameter) for parameter in unet.parameters()]
    with pytest.raises(KeyboardInterrupt), ParameterStudent.of(unet, "esd-x").installed() as student:
        with pytest.raises(ZeroDivisionError), student.teacher():
            _ = 1 / 0
        raise KeyboardInterrupt
    assert [id(parameter) for parameter in unet.parameters()] == objects
