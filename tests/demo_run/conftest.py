"""A miniature of the bundled model's caption tables."""

from typing import Any

import pytest


@pytest.fixture
def tables() -> dict[str, Any]:
    return {
        "objects": {
            "cat": ["kitten", "kitty"],
            "dog": ["puppy"],
            "car": ["automobile"],
            "apple": ["pippin"],
        },
        "styles": ["noto", "pixel", "neon"],
        "templates": ["a {o} in {s} style", "{o}, {s} style"],
        "object_templates": ["a {o}", "the {o}"],
        "style_templates": ["{s} style"],
        "plain_prompts": ["", "a picture"],
        "held_out": {
            "templates": ["look, a {o} in {s} style"],
            "object_templates": ["look, a {o}"],
            "style_templates": ["an emoji in the {s} style"],
            "synonym_in_template": [["puppy", "{o}, {s} style"]],
        },
    }
