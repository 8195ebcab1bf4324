"""Training: it learns, keeps its constraint, revives the dead, resumes bit for bit, and leaves the encoder alone."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.erase_ops.itd.attach import attach
from expunge.erase_ops.sae.config import SAETrainingConfig
from expunge.erase_ops.sae.files import load_sae
from expunge.erase_ops.sae.losses import UnitRows
from expunge.erase_ops.sae.metrics import evaluate_sae
from expunge.erase_ops.sae.model import SparseAutoencoder
from expunge.erase_ops.sae.training import SAETraining, train_sae
from expunge.erase_ops.training.loop import TrainingLoop, make_accelerator
from expunge.errors import AdapterMismatchError, InvalidInputError

PROMPTS = [
    f"a {noun} {place}"
    for noun, place in itertools.product(
        ("cat", "dog", "car", "panda", "tree", "house"), ("in the night", "on a beach", "with a sofa", "by monet")
    )
]
STEPS = {"max_train_steps": 60, "learning_rate": 3e-3, "token_batch_size": 48, "buffer_tokens": 96}


@pytest.fixture(scope="module")
def pair(tiny_sd: Callable[..., Any]) -> tuple[Any, Any]:
    pipe = tiny_sd()
    return pipe.text_encoder, pipe.tokenizer


def train(pair: tuple[Any, Any], folder: Path | None = None, stop: int | None = None, **fields: Any) -> Any:
    """Trains a small autoencoder; returns it and the history."""
    given = {"layer": 1, "width": 80, "k": 4, "auxk": 8, "bias_tokens": 64, "prompt_batch_size": 8}
    history: list[dict[str, float]] = []

    def callback(step: int, metrics: dict[str, float]) -> None:
        history.append(metrics)
        if step == stop:
            raise KeyboardInterrupt

    config = SAETrainingConfig(**(given | STEPS | fields))
    sae = train_sae(*pair, PROMPTS, config, output_dir=folder, progress=False, callback=callback)
    return sae, history


def test_it_learns_and_keeps_decoder_rows_at_unit_norm(pair: tuple[Any, Any], tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in pair[0].state_dict().items()}
    sae, history = train(pair, tmp_path, seed=3)
    assert history[-1]["fvu"] < 0.5 * history[0]["fvu"]
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(80), rtol=0, atol=1e-6)
    assert not torch.allclose(sae.W_enc, sae.W_dec, atol=1e-2)  # not tied
    assert sae.firing.shape == (80,) and 0 < sae.firing.sum() <= 4 + 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair[0].state_dict().items())
    again = load_sae(tmp_path)
    assert again.config == sae.config and again.config.layer == 1 and again.config.fingerprint is not None
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(again, name), getattr(sae, name))
    torch.testing.assert_close(again.firing, sae.firing, rtol=1e-5, atol=1e-9)


def test_a_resumed_run_gives_the_same_bits(pair: tuple[Any, Any], tmp_path: Path) -> None:
    fields = {"max_train_steps": 12, "dead_after_tokens": 96, "checkpointing_steps": 5}
    whole, history = train(pair, tmp_path / "whole", **fields)
    with pytest.raises(KeyboardInterrupt):
        train(pair, tmp_path / "cut", stop=7, **fields)
    resumed, rest = train(pair, tmp_path / "cut", resume_from_checkpoint="latest", **fields)
    assert rest == history[5:]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    with pytest.raises(AdapterMismatchError, match="different k"):
        train(pair, tmp_path / "cut", resume_from_checkpoint="latest", **(fields | {"k": 5}))


class Planted:
    """Tokens that are sums of three of sixty directions: what a dictionary is to find."""

    def __init__(self, width: int = 24) -> None:
        self.atoms = torch.nn.functional.normalize(torch.randn(60, width), dim=1)

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.rand(count, 60, generator=generator).topk(3).indices
        amounts = 0.5 + torch.rand(count, 3, generator=generator)
        return torch.zeros(count, 60).scatter(1, chosen, amounts) @ self.atoms


def test_auxk_revives_features_that_are_dead_by_tokens() -> None:
    """Two thirds of the features start with scores that never reach the best."""
    stream = Planted()
    sample = stream.draw(2000, torch.Generator().manual_seed(9))
    variance = (sample - sample.mean(0)).square().sum(1).mean()
    results = {}
    for auxk in (0, 24):
        config = SAETrainingConfig(
            width=120,
            k=3,
            auxk=auxk,
            dead_after_tokens=2000,
            token_batch_size=200,
            max_train_steps=150,
            learning_rate=3e-3,
        )
        accelerator = make_accelerator(config, torch.device("cpu"))
        sae = SparseAutoencoder.random(config.model_config(24), torch.Generator().manual_seed(4), sample.mean(0))
        sae.W_enc.data[:80] *= 0.2
        method = SAETraining(sae.requires_grad_(True), stream, config, variance, accelerator)
        loop = TrainingLoop(method, config, accelerator, progress=False, constraint=UnitRows(sae.W_dec))
        history = loop.run()
        assert all(step["dead"] == 0 and step["auxk"] == 0 for step in history[:10])  # ten steps are 2000 tokens
        assert history[12]["dead"] > 0.5 and (history[12]["auxk"] > 0) == bool(auxk)
        results[auxk] = history[-1]
    assert results[24]["dead"] < 0.5 * results[0]["dead"]
    assert results[24]["fvu"] < 0.8 * results[0]["fvu"]


def test_equal_seeds_give_equal_weights(pair: tuple[Any, Any]) -> None:
    fields = {"max_train_steps": 4}
    (one, _), (two, _), (other, _) = train(pair, **fields), train(pair, **fields), train(pair, seed=1, **fields)
    assert torch.equal(one.W_enc, two.W_enc) and not torch.equal(one.W_enc, other.W_enc)


def test_half_precision_encoders_train_float32_weights(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd()
    sae, history = train((pipe.text_encoder.to(torch.bfloat16), pipe.tokenizer), max_train_steps=3)
    assert sae.W_enc.dtype == torch.float32 and pipe.text_encoder.dtype == torch.bfloat16 and len(history) == 3


def test_an_erased_encoder_trains_and_is_judged_as_the_base_model(
    tiny_sd: Callable[..., Any], itd_for: Callable[..., Any]
) -> None:
    pipe = tiny_sd()
    pair = (pipe.text_encoder, pipe.tokenizer)
    plain, _ = train(pair, max_train_steps=3)
    settings = SAETrainingConfig(layer=1, width=80, k=4, auxk=8, padding_tokens=2)
    judged = evaluate_sae(plain, *pair, PROMPTS[:4], settings)
    ids = pipe.tokenizer("a cat", return_tensors="pt").input_ids
    before = pipe.text_encoder(ids).last_hidden_state
    attach(pipe.text_encoder, [itd_for(pipe, "cat")], gate=1.0)
    assert not torch.equal(pipe.text_encoder(ids).last_hidden_state, before)
    again, _ = train(pair, max_train_steps=3)
    assert torch.equal(plain.W_enc, again.W_enc) and evaluate_sae(plain, *pair, PROMPTS[:4], settings) == judged


def test_what_cannot_be_trained_is_named(pair: tuple[Any, Any]) -> None:
    with pytest.raises(InvalidInputError, match="a block of CLIPTextModel, 0 to 2"):
        train(pair, layer=3)
    with pytest.raises(InvalidInputError, match="output_dir"):
        train(pair, checkpointing_steps=1)
    config = SAETrainingConfig(layer=0, width=8, k=1, auxk=0, padding_tokens=0, bias_tokens=0)
    with pytest.raises(InvalidInputError, match="prompts whose tokens differ"):
        train_sae(*pair, [""], config, progress=False)


def test_whitened_training_gives_an_autoencoder_of_the_states_as_they_are(pair: tuple[Any, Any]) -> None:
    sae, history = train(pair, whiten=True, seed=3)
    assert history[-1]["fvu"] < 0.8 * history[0]["fvu"]
    config = SAETrainingConfig(layer=1, width=80, k=4, auxk=8, token_batch_size=48, buffer_tokens=96)
    found = evaluate_sae(sae, *pair, PROMPTS, config)
    assert found.fvu < 0.5
    assert not torch.allclose(sae.W_dec.norm(dim=1), torch.ones(80), atol=1e-2)  # the unit rows were the whitened ones
