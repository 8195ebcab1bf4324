"""Rows of EAR that need no pictures to be read: what must hold exactly, counted model calls, memory of one window."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bars import Bar
from bars_fused_linear_loss import Problem, memory_row
from torch import Tensor
from transformers import DynamicCache, JanusForConditionalGeneration

from expunge import ErasedPipeline, demo_ar, erase, restore
from expunge.demo_ar.builder.model import new_config, new_processor
from expunge.demo_ar.recipe import training_fields
from expunge.erase_ops.ear.config import EARConfig
from expunge.erase_ops.ear.method import EARTraining
from expunge.erase_ops.ear.pairs import ConceptPair
from expunge.erase_ops.ear.streams import EncodedPairs
from expunge.erase_ops.ear.training import student_of, train_ear
from expunge.erase_ops.janus.family import JanusFamily
from expunge.erase_ops.training.draws import Draws
from expunge.erase_ops.training.loop import TrainingLoop, make_accelerator
from expunge.pipelines.janus import JanusPipeline

PUBLISHED_CALLS = 4  # a token: the frozen model on three streams and the trained one, as their loop is written
PAIRS, REAL_TOKENS, REAL_WINDOW = 4, 576, 48
PAIR = ConceptPair("a red star on white", "a red ring on white", "star")


def rows() -> list[Bar]:
    """All of them; the pictures and windows are few, since each must hold."""
    pipe = JanusPipeline(*demo_ar.load())
    return [
        untrained_row(pipe.janus),
        equal_prompts_row(pipe),
        gradients_row(pipe.janus, "aligned"),
        gradients_row(pipe.janus, "stateless"),
        cached_row(pipe.janus),
        *life_cycle_rows(pipe),
        calls_row(),
        memory_row(Problem("gated KL", 9216, 16384, 1024), "gated KL, 9216 x 16384 x 1024", 512, 0.05),
    ]


@contextmanager
def method_of(family: JanusFamily, config: EARConfig) -> Iterator[EARTraining]:
    """The method with an untrained student."""
    family.model.requires_grad_(False)
    originals, modified = [pair.original for pair in config.prompts], [pair.modified for pair in config.prompts]
    text = EncodedPairs.of(family, originals, modified, config.retain)
    with student_of(family, config.sites(family.language_model.config.num_hidden_layers), config) as student:
        yield EARTraining(family, student, text, config)


def demo_config(**fields: Any) -> EARConfig:
    """The shipped preset with a few of its pairs."""
    given = training_fields("star")
    return EARConfig.preset("demo", **given | {"prompts": given["prompts"][:PAIRS]} | fields)


def windows(method: EARTraining) -> Iterator[dict[str, Tensor]]:
    """The losses of every window of every pair."""
    draws = Draws(torch.Generator().manual_seed(0))
    for _ in range(method.config.steps(method.family.image_tokens)):
        yield method.losses(draws)


def untrained_row(family: JanusFamily) -> Bar:
    """A = sum over the window of (1 + eta)^2 mean |h(c+) - h(c-)|^2 / 2; the unconditional row has no distance."""
    errors, config = [], demo_config(threshold=0.0, retain=())
    with method_of(family, config) as method:
        for losses in windows(method):
            rollout = method.rollout
            assert rollout is not None
            stop, tokens = rollout.window * config.window, rollout.tokens["positive"][:, :-1]
            with torch.no_grad():
                original = family.states(method.text.originals.rows(rollout.pairs), tokens).double()
                modified = family.states(method.text.modified.rows(rollout.pairs), tokens).double()
            tokens_losses = (1 + config.eta) ** 2 * (original - modified).square().mean(-1)[0] / 2
            expected = float(tokens_losses[stop - config.window : stop].sum())
            errors.append(abs(losses["erase"].item() - expected) / expected)
    found = f"{max(errors):.1e} ({len(errors)} windows of {PAIRS} pairs)"
    what = "untrained student: loss over (1 + eta)^2 mean |h(c+) - h(c-)|^2, largest relative difference"
    return Bar(what, "<= 1e-5 (rounding of float32)", found, max(errors) <= 1e-5)


def equal_prompts_row(pipe: JanusPipeline) -> Bar:
    """The same prompts on both sides, through the training loop: nothing to learn, and nothing moves."""
    family, config = pipe.janus, demo_config(threshold=0.0, learning_rate=1.0)
    config = config.replace(max_train_steps=config.steps(family.image_tokens))
    same = [pair.original for pair in config.prompts]
    with method_of(family, config) as method:
        method.text = EncodedPairs.of(family, same, same, config.retain)
        before = {name: weight.detach().clone() for name, weight in method.parameters().items()}
        log = TrainingLoop(method, config, make_accelerator(config, family.device), progress=False).run()
        kept = all(torch.equal(weight, before[name]) for name, weight in method.parameters().items())
    zero = sum(step["erase"] == step["retain"] == 0.0 for step in log)
    skipped = sum("loss" not in step for step in log)
    return Bar(
        "equal prompts: windows whose losses are exactly 0; windows that are skipped; weights after all of them",
        "all; all; the same bits",
        f"{zero} and {skipped} of {len(log)}; {'the same bits' if kept else 'changed'}",
        zero == skipped == len(log) and kept,
    )


def gradients_row(family: JanusFamily, mode: str) -> Bar:
    """Smallest gradient norm of a query or key projection over that of the largest projection, of every window."""
    ratios, config = [], demo_config(threshold=0.0, retain=(), prefix_mode=mode)
    with method_of(family, config) as method:
        parameters = method.parameters()
        for losses in windows(method):
            gradients = torch.autograd.grad(losses["loss"], list(parameters.values()))
            norms = {name: float(gradient.norm()) for name, gradient in zip(parameters, gradients, strict=True)}
            queries_keys = [norm for name, norm in norms.items() if "q_proj" in name or "k_proj" in name]
            ratios.append((min(queries_keys) if mode == "aligned" else max(queries_keys)) / max(norms.values()))
    if mode == "aligned":
        what, bar, holds = (
            "aligned prefixes: least gradient of queries and keys",
            "> 0 in every window",
            min(ratios) > 0,
        )
        return Bar(what, bar, f"{min(ratios):.1e} of the largest ({len(ratios)} windows)", holds)
    later = [ratio for number, ratio in enumerate(ratios) if number % config.windows(family.image_tokens)]
    what, bar = "stateless, as published: most gradient of queries and keys after the first window", "printed"
    return Bar(what, bar, f"{max(later):.1e} of the largest ({len(later)} windows)", True)


@torch.no_grad()
def cached_row(family: JanusFamily) -> Bar:
    """States of the decode loop's cache against those of whole sequences."""
    prompts = family.encode([PAIR.original, "a small picture showing an orange ring on a black background"])
    tokens = torch.randint(family.codes, (2, family.image_tokens), generator=torch.Generator().manual_seed(0))
    forced = family.states(prompts, tokens[:, :-1])
    cache, mask = DynamicCache(config=family.language_model.config), prompts.mask
    states = [family.run(family.model.get_input_embeddings()(prompts.ids), mask, cache)[:, -1]]
    for step in range(family.image_tokens - 1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        states.append(family.run(family.embed_tokens(tokens[:, step : step + 1]), mask, cache)[:, -1])
    error = float((forced - torch.stack(states, 1)).abs().max() / forced.abs().max())
    what = f"states by the cache against teacher-forced ones, {family.image_tokens} tokens: largest relative difference"
    return Bar(what, "<= 1e-5", f"{error:.1e}", error <= 1e-5)


def life_cycle_rows(pipe: JanusPipeline) -> list[Bar]:
    """Adapter off, saved and loaded, base weights: of a delta that was trained for a moment."""

    def drawn(one: Any) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
        tokens: Tensor = one([PAIR.original] * 8, generator=generators, output_type="tokens").tokens
        return tokens

    def digest() -> str:
        named = pipe.model.named_parameters()
        return hashlib.sha256(b"".join(name.encode() + p.detach().numpy().tobytes() for name, p in named)).hexdigest()

    base, weights = drawn(pipe), digest()
    delta = train_ear(pipe, demo_config(), progress=False)
    untouched = digest() == weights
    with tempfile.TemporaryDirectory() as folder:
        erased = drawn(erase(pipe, [delta]))
        pipe.save_pretrained(folder)
        restore(pipe)
        again = drawn(ErasedPipeline.from_pretrained(folder))
    off, saved = torch.equal(drawn(pipe), base), torch.equal(again, erased)
    changed = int((erased != base).any(1).sum())
    return [
        Bar("adapter off: tokens of 8 pictures against the base's", "identical", said(off), off and changed > 0),
        Bar(
            "saved and loaded: tokens of 8 erased pictures",
            "identical",
            f"{said(saved)} ({changed} of them differ from the base's)",
            saved and changed > 0,
        ),
        Bar("base weights' hash after training and erasing", "identical", said(untouched), untouched),
    ]


def said(equal: bool) -> str:
    return "identical" if equal else "different"


def calls_row() -> Bar:
    """Calls of the language model, counted over one prompt of a model with the real number of tokens."""
    family, calls = real_length_family(), [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    config = EARConfig(prompts=(PAIR,), layers=(0,), window=REAL_WINDOW)
    with method_of(family, config) as method:
        handle = family.language_model.register_forward_pre_hook(count)
        for _ in windows(method):
            pass
        handle.remove()
    published = PUBLISHED_CALLS * family.image_tokens
    share = calls[0] / published
    what = f"model calls a prompt over the published scripts, {family.image_tokens} tokens, windows of {REAL_WINDOW}"
    return Bar(
        what, "<= 0.30", f"{calls[0]} / {published} = {share:.3f} (counted; published by their loop)", share <= 0.3
    )


def real_length_family() -> JanusFamily:
    """An untrained Janus as small as the demo's, but with 24 x 24 image tokens as Janus-Pro has."""
    processor = new_processor()
    config = new_config(processor)
    side = math.isqrt(REAL_TOKENS)
    config.vision_config.image_size = side * config.vision_config.patch_size
    config.vision_config.num_image_tokens = REAL_TOKENS
    config.vq_config.num_patches = side
    config.text_config.max_position_embeddings = 2 * REAL_TOKENS
    torch.manual_seed(0)
    return JanusFamily(JanusForConditionalGeneration(config).eval(), processor)
