"""What a Janus model does that an eraser must not fall for: the rows, the prompts, the states and the pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from expunge.erase_ops.janus.family import JanusFamily, Prompts
from expunge.errors import AdapterMismatchError, InvalidInputError, UnsupportedOperationError

TEXTS = ["a red star on white", "an orange ring on a black background", "a moon on black"]


@pytest.fixture(scope="module")
def family(tiny_janus: Callable[..., Any]) -> JanusFamily:
    return JanusFamily(*tiny_janus())


class TestPrompts:
    def test_a_prompt_without_begin_of_image_conditions_on_nothing(self, family: JanusFamily) -> None:
        """transformers' processor leaves the token away unless asked for it, and draws on silently."""
        bare = family.processor(text=TEXTS, padding=True, return_tensors="pt")["input_ids"]
        assert (bare[:, -1] != family.begin).all()
        assert (family.encode(TEXTS).ids[:, -1] == family.begin).all()

    def test_unconditional_rows_keep_bos_and_begin_of_image_only(self, family: JanusFamily) -> None:
        prompts = family.encode(TEXTS)
        rows = family.unconditional(prompts)
        kept = (prompts.ids == family.bos) | (prompts.ids == family.begin)
        assert torch.equal(rows.ids, torch.where(kept, prompts.ids, family.pad))
        assert torch.equal(rows.mask, prompts.mask)  # the padding in the words' place is attended to
        assert kept.sum(1).eq(2).all()

    def test_prompts_are_wrapped_in_the_chat_template(self, family: JanusFamily) -> None:
        """Janus-Pro is used with one; the published scripts train without it."""
        processor = copy.copy(family.processor)
        processor.chat_template = "{% for m in messages %}draw {{ m['content'][0]['text'] }}{% endfor %} on white"
        wrapped = JanusFamily(family.model, processor).encode(["a red star"])
        assert torch.equal(wrapped.ids, family.encode(["draw a red star on white"]).ids)

    def test_the_mask_is_never_missing(self, family: JanusFamily) -> None:
        """transformers repeats the mask it was given, and fails on none."""
        prompts = family.encode(TEXTS[:1])
        assert prompts.mask.shape == prompts.ids.shape
        with pytest.raises(AttributeError, match="NoneType"):
            family.model.generate(prompts.ids, attention_mask=None, generation_mode="image", guidance_scale=2.0)

    @pytest.mark.parametrize("text", ["", "   "])
    def test_an_empty_prompt_is_refused(self, family: JanusFamily, text: str) -> None:
        with pytest.raises(InvalidInputError, match=r"prompt\[1\]"):
            family.encode(["a star", text])

    def test_a_prompt_that_leaves_no_room_for_the_picture_is_refused(self, family: JanusFamily) -> None:
        with pytest.raises(InvalidInputError, match="at most 64 tokens"):
            family.encode(["star " * 63])


class TestStates:
    def test_cached_states_are_the_teacher_forced_ones(self, family: JanusFamily) -> None:
        prompts = family.encode(TEXTS)
        tokens = torch.randint(family.codes, (3, 12))
        with torch.no_grad():
            forced = family.states(prompts, tokens)
            cache, mask = DynamicCache(config=family.language_model.config), prompts.mask
            states = [family.run(family.model.get_input_embeddings()(prompts.ids), mask, cache)[:, -1]]
            for step in range(12):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                states.append(family.run(family.embed_tokens(tokens[:, step : step + 1]), mask, cache)[:, -1])
        assert (forced - torch.stack(states, 1)).abs().max() < 1e-5 * forced.abs().max()

    def test_left_padded_batches_are_single_rows(self, family: JanusFamily) -> None:
        tokens = torch.randint(family.codes, (3, 5))
        with torch.no_grad():
            together = family.states(family.encode(TEXTS), tokens)
            alone = [family.states(family.encode([text]), tokens[i : i + 1]) for i, text in enumerate(TEXTS)]
        assert (together - torch.cat(alone)).abs().max() < 1e-5 * together.abs().max()

    def test_prompts_matter(self, family: JanusFamily) -> None:
        """Guards the other tests: on a model that ignores its prompts they would all pass."""
        with torch.no_grad():
            states = family.states(family.encode(TEXTS), torch.zeros(3, 4, dtype=torch.int64))
        assert (states[0] - states[1]).norm() > 0.05 * states[0].norm()

    def test_image_logits_are_not_those_of_forward(self, family: JanusFamily) -> None:
        """`forward` returns text logits; the image head is a part of its own, linear, activation, linear."""
        prompts = family.encode(TEXTS)
        with torch.no_grad():
            text = family.model(input_ids=prompts.ids, attention_mask=prompts.mask).logits
            states = family.states(prompts, prompts.ids[:, :0])
            logits = family.logits(states)
            apart = family.last_head(family.head_input(states))
        assert text.shape[-1] == family.language_model.config.vocab_size
        assert logits.shape == (3, 1, family.codes)
        assert torch.equal(logits, apart)

    def test_rows_and_cat_keep_the_order(self, family: JanusFamily) -> None:
        prompts = family.encode(TEXTS)
        turned = Prompts.cat([prompts.rows([2, 0]), prompts.rows(slice(1, 2))])
        assert torch.equal(turned.ids, prompts.ids[[2, 0, 1]])
        assert len(turned) == 3


class TestPictures:
    def test_decoding_needs_no_torchvision_and_gives_channels_first(self, family: JanusFamily) -> None:
        """`processor.postprocess` fails on the model's own output where torchvision is absent."""
        tokens = torch.randint(family.codes, (2, family.image_tokens))
        pictures = family.pictures(tokens)
        with torch.no_grad():
            raw = family.model.decode_image_tokens(tokens)
        assert pictures.shape == (2, 3, 32, 32)
        assert torch.allclose(pictures, ((raw.permute(0, 3, 1, 2) + 1) / 2).clamp(0, 1))

    @pytest.mark.parametrize(
        "tokens",
        [torch.zeros(1, 63, dtype=torch.int64), torch.full((1, 64), 256), -torch.ones(1, 64, dtype=torch.int64)],
    )
    def test_wrong_lengths_and_codes_are_refused(self, family: JanusFamily, tokens: torch.Tensor) -> None:
        with pytest.raises(InvalidInputError, match="tokens"):
            family.pictures(tokens)


class TestRefusals:
    def test_a_model_without_an_image_head(self, family: JanusFamily) -> None:
        with pytest.raises(UnsupportedOperationError, match="JanusForConditionalGeneration"):
            JanusFamily(SimpleNamespace(model=SimpleNamespace(language_model=1)), family.processor)

    def test_a_processor_of_another_kind(self, family: JanusFamily) -> None:
        with pytest.raises(UnsupportedOperationError, match="JanusProcessor"):
            JanusFamily(family.model, family.processor.image_processor)

    def test_bos_and_pad_are_mandatory(self, family: JanusFamily) -> None:
        processor = copy.deepcopy(family.processor)
        processor.tokenizer.pad_token = None
        with pytest.raises(InvalidInputError, match="pad_token"):
            JanusFamily(family.model, processor)

    def test_a_processor_with_more_words_than_the_model(self, family: JanusFamily) -> None:
        processor = copy.deepcopy(family.processor)
        processor.tokenizer.add_tokens(["pentagon"])
        with pytest.raises(AdapterMismatchError, match="words"):
            JanusFamily(family.model, processor)
