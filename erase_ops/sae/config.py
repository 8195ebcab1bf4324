"""What a sparse autoencoder is, and how one is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch

from expunge.erase_ops.training.config import About, TrainingConfig, coerce_fields, field_names, refuse_unknown_keys
from expunge.errors import InvalidInputError

Activation = Literal["topk", "batchtopk", "jumprelu"]
EncodeDtype = Literal["float32", "float16", "bfloat16"]
Padding = Literal["max_length", "longest"]
Component = Literal["text_encoder", "text_encoder_2", "text_encoder_3"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_WIDTH = 2**24


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """The arithmetic of a sparse autoencoder, and the place that it belongs to.

    With p = (x - b_pre) W_encᵀ + b_enc, where b_pre is b_dec or, without `apply_b_dec_to_input`, zero:

    | activation | an activation is |
    |---|---|
    | topk | relu(p), of the k best features of a token (smaller id first among equals); 0 for the others |
    | batchtopk, jumprelu | p where p > threshold and p > 0, else 0: each token for itself, whatever its batch |

    BatchTopK chooses across a batch in training alone; what it is used with afterwards is one threshold for all
    features. JumpReLU has one a feature; an autoencoder with plain ReLU is one whose thresholds are 0.

    Args:
        d_in: width d of the hidden states.
        width: number h of features.
        k: active features of a token; of the threshold activations the mean number, where it is known.
        activation: see the table.
        apply_b_dec_to_input: whether b_dec is subtracted from the input before encoding.
        encode_dtype: dtype of the encoder product's operands. The choice of the k best jumps, so that it is pinned here
            and follows neither the model's dtype nor autocast; sums are float32.
        component: the pipeline's component whose hidden states these are.
        layer: they are the output of this block, counted from 0: `hidden_states[layer + 1]`. None if it is not known.
        model: name of the model that the component belongs to.
        fingerprint: of that component's weights, see `erase_ops.fingerprint`.

    Raises:
        InvalidInputError: if a value is outside its range; the message names the field.
    """

    d_in: int
    width: int
    k: int | None = None
    activation: Activation = "topk"
    apply_b_dec_to_input: bool = True
    encode_dtype: EncodeDtype = "float32"
    component: Component = "text_encoder"
    layer: int | None = None
    model: str = ""
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        coerce_fields(self)
        self._require("d_in", self.d_in >= 1, "at least 1")
        self._require("width", 1 <= self.width <= MAX_WIDTH, f"1 to {MAX_WIDTH}")
        self._require("layer", self.layer is None or self.layer >= 0, "a block's number from 0, or None")
        if self.activation == "topk":
            self._require("k", self.k is not None, f"1 to {self.width}, since the activation is topk")
        self._require("k", self.k is None or 1 <= self.k <= self.width, f"1 to {self.width}, the width")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InvalidInputError(
                f"SAEConfig.{name}", expected=expected, found=repr(getattr(self, name)), fix="Correct the value."
            )

    @property
    def dtype(self) -> torch.dtype:
        """`encode_dtype` as torch knows it."""
        return DTYPES[self.encode_dtype]

    @property
    def uses_threshold(self) -> bool:
        """Whether activity is decided by a threshold, so that no other feature's score matters."""
        return self.activation != "topk"

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; checked again."""
        refuse_unknown_keys("SAEConfig", changes, field_names(self))
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields in JSON's types; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config with these fields, the others at their defaults.

        Raises:
            InvalidInputError: if a key is unknown or missing, or a value of the wrong type or outside its range.
        """
        refuse_unknown_keys("SAEConfig", values, field_names(cls))
        for name in ("d_in", "width"):
            if name not in values:
                raise InvalidInputError("SAEConfig", expected=name, found="nothing under that name", fix="Add it.")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class SAETrainingConfig(TrainingConfig):
    """Settings of `train_sae`; each field's type, default and meaning stand beside it (`help_for` reads them).

    Raises:
        InvalidInputError: if a value is outside its range or two do not fit; the message names the field.
    """

    # What is trained
    component: Annotated[Component, About("The text encoder whose hidden states are taken.")] = "text_encoder"
    layer: Annotated[int, About("They are the output of this block, counted from 0.")] = 8
    width: Annotated[int, About("Number of features.")] = 16384
    k: Annotated[int, About("Active features of a token.")] = 32
    encode_dtype: Annotated[EncodeDtype, About("Dtype of the encoder product's operands, at inference too.")] = (
        "float32"
    )

    # Tokens
    prompts_file: Annotated[
        str | None, About("Text file with a prompt a line; for the command line, functions take the prompts.")
    ] = None
    prompt_batch_size: Annotated[int, About("Prompts that go through the text encoder together.")] = 64
    token_batch_size: Annotated[int, About("Tokens of one optimiser step.")] = 1024
    buffer_tokens: Annotated[int, About("Activations that are held and mixed before tokens are drawn.")] = 32768
    train_on_bos: Annotated[bool, About("Train on the first token too; its state is the same for every prompt.")] = (
        False
    )
    padding: Annotated[
        Padding, About("Prompts are padded to the tokenizer's length, as pipelines do, or to the longest of a batch.")
    ] = "max_length"
    padding_tokens: Annotated[
        int | None, About("Padding tokens of a prompt that are trained on, drawn at random; None for all of them.")
    ] = 8
    attention_mask: Annotated[
        bool, About("Hide the padding from the encoder: BERT-like encoders need it, pipelines of CLIP and T5 do not.")
    ] = False

    # The objective
    whiten: Annotated[
        bool, About("Reconstruct states made equally wide in every direction; undone in the weights afterwards.")
    ] = False
    auxk: Annotated[int, About("Dead features that model what is left of the input; 0 switches it off.")] = 256
    auxk_weight: Annotated[float, About("Weight of that loss.")] = 1 / 32
    dead_after_tokens: Annotated[int, About("A feature is dead once it has not fired for so many tokens.")] = 1_000_000
    bias_tokens: Annotated[int, About("Tokens whose geometric median is the first b_dec; 0 starts at zero.")] = 4096

    # Optimisation: Gao et al. 2024 take Adam without weight decay and this epsilon.
    max_train_steps: Annotated[int, About("Number of optimiser steps.")] = 10_000
    learning_rate: Annotated[float, About("Peak learning rate.")] = 2e-4
    adam_weight_decay: Annotated[float, About("AdamW's weight decay.")] = 0.0
    adam_epsilon: Annotated[float, About("AdamW's epsilon.")] = 6.25e-10
    lr_warmup_steps: Annotated[int, About("Steps over which the learning rate rises from zero.")] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "k", "prompt_batch_size", "token_batch_size", "dead_after_tokens"):
            self.require(name, lambda value: value >= 1, "at least 1")
        for name in ("layer", "auxk", "auxk_weight", "bias_tokens"):
            self.require(name, lambda value: value >= 0, "0 or more")
        for name in ("k", "auxk"):
            self.require(name, lambda value: value <= self.width, f"at most {self.width}, the width")
        self.require("padding_tokens", lambda value: value is None or value >= 0, "None or 0 or more")
        if self.attention_mask:
            self.require("padding_tokens", lambda value: value == 0, "0: a hidden token's state means nothing")
        self.require("buffer_tokens", lambda value: value >= self.token_batch_size, "at least token_batch_size")
        self.require("validation_steps", lambda value: value is None, "None: there are no pictures to draw")
        self.require("mixed_precision", lambda value: value != "fp16", "'no' or 'bf16': no loss is scaled here")

    def model_config(self, d_in: int, **more: Any) -> SAEConfig:
        """The config of the autoencoder that these settings train on hidden states of width `d_in`."""
        return SAEConfig(
            d_in=d_in,
            width=self.width,
            k=self.k,
            encode_dtype=self.encode_dtype,
            component=self.component,
            layer=self.layer,
            **more,
        )
