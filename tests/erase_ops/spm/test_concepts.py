"""Concepts: what they hold is checked where they are made."""

from typing import Any

import pytest
import torch

from expunge.erase_ops.spm import Concept
from expunge.errors import InvalidInputError


def test_defaults() -> None:
    concept = Concept("cat")
    assert (concept.phrasings, concept.states, concept.token_ids, concept.all_token_ids) == (("cat",), None, None, None)
    states = torch.ones(2, 3, 4)
    assert Concept("cat", states, (1,), (1, 2), ("cat", "a cat")).states is states
    assert Concept("Paris, Texas").text == "Paris, Texas"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": " "}, "not empty"),
        ({"text": None}, "not empty"),
        ({"text": "\ud800"}, "not empty"),
        ({"phrasings": ("cat", 1)}, "phrasings"),
        ({"states": torch.ones(2, 3, 4)}, r"states \[1, L, D\]"),
        ({"states": torch.ones(3, 4)}, "float32"),
        ({"states": torch.ones(1, 0, 4)}, "float32"),
        ({"states": torch.ones(1, 3, 4).half()}, "float16"),
        ({"token_ids": (1, -1)}, "token ids"),
        ({"all_token_ids": (True,)}, "token ids"),
        ({"token_ids": (2**31,)}, "token ids"),
    ],
)
def test_what_is_no_concept(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        Concept(**{"text": "cat", **fields})
