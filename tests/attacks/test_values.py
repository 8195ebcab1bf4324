"""Well-formed files whose numbers would break an image, or quietly do nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from expunge.errors import AdapterFormatError, ExpungeError, NonFiniteError

from .conftest import artefact, kohya, save

Refusal = Callable[..., ExpungeError]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("part", ["down", "up", "alpha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_not_finite(tmp_path: Path, expect_refusal: Refusal, value: float, part: str, dtype: torch.dtype) -> None:
    shape = {"down": (1, 3), "up": (2, 1), "alpha": ()}[part]
    tensor = torch.ones(shape, dtype=dtype)
    tensor.view(-1)[-1] = value
    tensors = {key: item.to(dtype) for key, item in kohya(**{part: tensor}).items()}
    expect_refusal(NonFiniteError, save(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float64])
@pytest.mark.parametrize("part", ["down", "up"])
def test_weights_of_another_type(tmp_path: Path, expect_refusal: Refusal, dtype: torch.dtype, part: str) -> None:
    shape = {"down": (1, 3), "up": (2, 1)}[part]
    expect_refusal(
        AdapterFormatError, save(tmp_path / "x.safetensors", kohya(**{part: torch.ones(shape, dtype=dtype)}))
    )


@pytest.mark.parametrize("alpha", [torch.tensor(0.0), torch.tensor(-1.0), torch.ones(2), torch.tensor(True)])
def test_an_alpha_that_is_none(tmp_path: Path, expect_refusal: Refusal, alpha: torch.Tensor) -> None:
    expect_refusal(AdapterFormatError, save(tmp_path / "x.safetensors", kohya(alpha=alpha)))


@pytest.mark.parametrize("changes", [{"up": torch.ones(2, 2)}, {"up": torch.ones(2, 1, 1, 1)}, {"up": torch.ones(2)}])
def test_factors_that_do_not_fit(tmp_path: Path, expect_refusal: Refusal, changes: dict[str, Any]) -> None:
    expect_refusal(AdapterFormatError, save(tmp_path / "x.safetensors", kohya(**changes)))


@pytest.mark.parametrize("key", ["concepts.0.states", "factors.a.b.down", "factors.a.b.up"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_an_artefact_that_is_not_finite(tmp_path: Path, expect_refusal: Refusal, key: str, value: float) -> None:
    """With a checksum that holds: whoever wrote the file could compute it."""
    folder = artefact(tmp_path / "x")
    tensors = load_file(folder / "erasure.safetensors")
    tensors[key].view(-1)[0] = value
    replace_tensors(folder, tensors)
    expect_refusal(NonFiniteError, folder, concepts=None)


TENSOR_CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "half of the factors": lambda t: t.pop("factors.a.b.up"),
    "unknown key": lambda t: t.update(extra=torch.ones(1)),
    "site that leads out": lambda t: t.update(
        {"factors.../x.down": torch.ones(1, 3), "factors.../x.up": torch.ones(2, 1)}
    ),
    "site without a name": lambda t: t.update({"factors..down": torch.ones(1, 3), "factors..up": torch.ones(2, 1)}),
    "states of a concept that is not there": lambda t: t.update({"concepts.7.states": torch.ones(1, 2, 3)}),
    "states of two phrasings for one": lambda t: t.update({"concepts.0.states": torch.ones(2, 2, 3)}),
    "states without a length": lambda t: t.update({"concepts.0.states": torch.ones(1, 3)}),
    "states in float16": lambda t: t.update({"concepts.0.states": torch.ones(1, 2, 3).half()}),
    "factors of two types": lambda t: t.update({"factors.a.b.up": torch.ones(2, 2).half()}),
    "factors that do not fit": lambda t: t.update({"factors.a.b.up": torch.ones(2, 3)}),
    "no factors": lambda t: [t.pop(key) for key in list(t) if key.startswith("factors.")],
    "integers": lambda t: t.update({"factors.a.b.up": torch.ones(2, 2, dtype=torch.int64)}),
}


@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_an_artefact_with_other_tensors(tmp_path: Path, expect_refusal: Refusal, name: str) -> None:
    folder = artefact(tmp_path / "x")
    tensors = load_file(folder / "erasure.safetensors")
    TENSOR_CHANGES[name](tensors)
    replace_tensors(folder, tensors)
    expect_refusal(AdapterFormatError, folder, concepts=None)


def replace_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    data = safetensors.torch.save(tensors)
    (folder / "erasure.safetensors").write_bytes(data)
    record = json.loads((folder / "erasure.json").read_text())
    record["files"] = {"erasure.safetensors": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    (folder / "erasure.json").write_text(json.dumps(record))
