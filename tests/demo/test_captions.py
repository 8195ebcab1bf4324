"""The caption tables: what is held out stays out, and the bundled record says the same as the builder."""

from __future__ import annotations

import random

from expunge import demo
from expunge.demo.builder import captions, concepts


def test_held_out_templates_are_not_among_the_others() -> None:
    record = demo.captions()
    for kind in ("templates", "object_templates", "style_templates"):
        assert record["held_out"][kind], kind
        assert not set(record["held_out"][kind]) & set(record[kind])
    assert len(record["templates"]) >= 20
    assert all(len(synonyms) >= 2 for synonyms in record["objects"].values())


def test_bundled_record_is_what_the_builder_writes() -> None:
    assert demo.captions() == concepts.captions_record()


def test_every_test_word_is_in_the_training_captions() -> None:
    words = set(captions.vocabulary())
    record = demo.captions()
    for template in [*record["held_out"]["templates"], *record["held_out"]["object_templates"]]:
        text = concepts.fill(template, "cat", "noto")
        assert {w.strip(",.!?") for w in text.split()} <= words


def test_labels_say_what_the_caption_names() -> None:
    rng = random.Random(0)
    for _ in range(200):
        o, s = rng.randrange(40), rng.randrange(6)
        caption = captions.draw(rng, o, s)
        name = list(concepts.OBJECTS)[o]
        names = (name, *concepts.OBJECTS[name].synonyms)
        assert (caption.object == o) == any(word in caption.text for word in names) or caption.object == captions.NONE
        assert (caption.style == s) == (concepts.STYLES[s] in caption.text)


def test_article_before_a_vowel() -> None:
    assert concepts.fill("a {o} in {s} style", "owl", "noto") == "an owl in noto style"
    assert concepts.fill("a {o} in {s} style", "ukulele", "noto") == "a ukulele in noto style"
    assert concepts.fill("{s} style {o}", "cat", "noto") == "noto style cat"
