"""Training of a TopK autoencoder on a text encoder's hidden states."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from expunge.erase_ops.fingerprint import weights_fingerprint
from expunge.erase_ops.hookpoints import block_path
from expunge.erase_ops.sae.activations import ActivationStream
from expunge.erase_ops.sae.config import SAETrainingConfig
from expunge.erase_ops.sae.files import save_sae
from expunge.erase_ops.sae.losses import UnitRows, geometric_median, sae_losses
from expunge.erase_ops.sae.model import SparseAutoencoder
from expunge.erase_ops.sae.whitening import Whitening
from expunge.erase_ops.training.borrowed import deterministic, evaluating
from expunge.erase_ops.training.draws import Draws, seeded_generator
from expunge.erase_ops.training.loop import Callback, TrainingLoop, make_accelerator
from expunge.erase_ops.unedited import unedited
from expunge.errors import InvalidInputError

logger = logging.getLogger(__name__)

# Keys of the seed's streams: tokens of the first bias, and tokens that firing is counted on.
_SAMPLE, _FIRING = (0, 1), (0, 2)
ROUNDING = 1e-10  # share of the mean square that equal tokens may seem to vary by
FEWEST_TOKENS = 256  # whose mean and variance are taken, where bias_tokens is smaller


def train_sae(
    text_encoder: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    config: SAETrainingConfig,
    *,
    output_dir: str | Path | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> SparseAutoencoder:
    """Trains a TopK autoencoder of the hidden states after one block of a text encoder.

    Weights are float32 whatever the text encoder's dtype. The encoder is given back as it was; an erasure that it
    carries is set aside meanwhile.

    Args:
        text_encoder: a CLIP, T5 or BERT-like encoder of transformers, where it is to run.
        tokenizer: its tokenizer.
        prompts: what it is trained on: prompts as users write them, with and without the concepts that may be erased.
        config: settings.
        output_dir: where the autoencoder (SAELens layout), `checkpoint-*` folders and `training_log.json` go; the
            config's if None. Without either nothing is written.
        progress: whether to show a progress bar.
        callback: called after every step with the number of steps done and `{"loss": ..., "fvu": ..., "auxk": ...,
            "l0": ..., "dead": share of dead features, "learning_rate": ...}`.

    Returns:
        The autoencoder, on the CPU, with the share of tokens that each feature fires on.

    Raises:
        UnsupportedOperationError: if the encoder is of an unknown kind.
        InvalidInputError: if there is no prompt or no such block, or checkpoints are wanted without an output folder.
        NonFiniteError: if hidden states, a loss or a weight stop being finite.
        AdapterFormatError: if the checkpoint to resume from is damaged.
        AdapterMismatchError: if it belongs to another model or other settings.

    Example:
        sae = train_sae(pipe.text_encoder, pipe.tokenizer, prompts, SAETrainingConfig(layer=8), output_dir="sae")
    """
    folder = _output_folder(config, output_dir)
    block_path(text_encoder, config.layer)
    device = next(text_encoder.parameters()).device
    accelerator = make_accelerator(config, device)
    if accelerator.num_processes > 1:
        text_encoder.to(accelerator.device)
    with deterministic(accelerator.device), evaluating(text_encoder), unedited():
        stream = ActivationStream(text_encoder, tokenizer, list(prompts), config)
        method = SAETraining.start(stream, config, accelerator)
        loop = TrainingLoop(method, config, accelerator, folder, progress, callback)
        loop.constraint = UnitRows(method.sae.W_dec)
        loop.run()
        sae = method.trained()
        firing = firing_shares(sae, stream, config)
    sae = sae.cpu()
    sae.config = sae.config.replace(fingerprint=weights_fingerprint([text_encoder], [tokenizer]))
    sae.firing = firing.cpu()
    if folder is not None and accelerator.is_main_process:
        save_sae(sae, folder, settings=config.to_dict())
    return sae


class SAETraining:
    """The method that the training loop runs: an autoencoder and the losses of one batch of tokens.

    Args:
        sae: trained in place; float32.
        stream: where tokens come from.
        config: the settings.
        variance: V of the losses, a scalar.
        accelerator: joins the processes' counts of tokens.
        whitening: what tokens go through first; the autoencoder is then one of whitened states.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        stream: ActivationStream,
        config: SAETrainingConfig,
        variance: Tensor,
        accelerator: Accelerator,
        whitening: Whitening | None = None,
    ) -> None:
        self.sae, self.stream, self.config = sae, stream, config
        self.variance, self.accelerator, self.whitening = variance, accelerator, whitening
        # [h] int64: tokens, of all processes, since each feature fired
        self.since_fired = torch.zeros(config.width, dtype=torch.int64, device=variance.device)

    @classmethod
    def start(cls, stream: ActivationStream, config: SAETrainingConfig, accelerator: Accelerator) -> SAETraining:
        """An untrained autoencoder whose b_dec is the geometric median of a sample of tokens."""
        generator = seeded_generator(config.seed, *_SAMPLE)
        sampler = ActivationStream(stream.encoder, stream.tokenizer, stream.prompts, config)
        few = max(config.bias_tokens, FEWEST_TOKENS)
        sample = sampler.draw(max(few, config.buffer_tokens) if config.whiten else few, generator)
        whitening = Whitening.of(sample) if config.whiten else None
        sample = sample if whitening is None else whitening.apply(sample[:few])
        variance = (sample - sample.mean(0)).square().sum(-1).mean()
        if not bool(variance > ROUNDING * sample.square().sum(-1).mean()):
            raise InvalidInputError(
                "prompts",
                expected="prompts whose tokens differ",
                found="one and the same hidden state for all",
                fix="Pass a file of many different prompts.",
            )
        b_dec = geometric_median(sample) if config.bias_tokens else None
        model = Path(getattr(stream.encoder.config, "_name_or_path", "")).name or type(stream.encoder).__name__
        weights = seeded_generator(config.seed, 0)
        sae = SparseAutoencoder.random(config.model_config(sample.shape[1], model=model), weights, b_dec)
        return cls(sae.to(sample.device).requires_grad_(True), stream, config, variance, accelerator, whitening)

    def trained(self) -> SparseAutoencoder:
        """The autoencoder of hidden states as they are; nothing of it requires gradients."""
        sae = self.sae.requires_grad_(False)
        return sae if self.whitening is None else self.whitening.fold(sae)

    def parameters(self) -> dict[str, Tensor]:
        """The autoencoder's four tensors."""
        return dict(self.sae.named_parameters())

    def losses(self, draws: Draws) -> dict[str, Tensor]:
        """The losses of the next tokens: "loss", its parts "fvu" and "auxk", "l0", and the share "dead"."""
        x = self.stream.draw(self.config.token_batch_size, draws.stream)
        x = x if self.whitening is None else self.whitening.apply(x)
        dead = (self.since_fired >= self.config.dead_after_tokens).nonzero()[:, 0]
        found = sae_losses(self.sae, x, self.variance, dead, self.config.auxk, self.config.auxk_weight)
        self._count(found.fired, len(x))
        share = torch.tensor(len(dead) / self.config.width, device=x.device)
        return {"loss": found.total, "fvu": found.fvu, "auxk": found.auxk, "l0": found.l0, "dead": share}

    def _count(self, fired: Tensor, tokens: int) -> None:
        processes = self.accelerator.num_processes
        if processes > 1:
            fired = self.accelerator.reduce(fired.float(), "sum") > 0
        self.since_fired = torch.where(fired, 0, self.since_fired + tokens * processes)

    def state_dict(self) -> dict[str, Tensor]:
        """The stream's state, and for how long each feature has not fired."""
        return {f"stream.{name}": tensor for name, tensor in self.stream.state_dict().items()} | {
            "since_fired": self.since_fired
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        own = dict(tensors)
        self.since_fired = own.pop("since_fired").to(self.variance.device)
        self.stream.load_state_dict({name.removeprefix("stream."): tensor for name, tensor in own.items()})


@torch.no_grad()
def firing_shares(sae: SparseAutoencoder, stream: ActivationStream, config: SAETrainingConfig) -> Tensor:
    """The share of tokens that each feature fires on, `[h]` float32, over a buffer of a config's tokens."""
    generator = seeded_generator(config.seed, *_FIRING)
    sampler = ActivationStream(stream.encoder, stream.tokenizer, stream.prompts, config)
    counts = torch.zeros(sae.config.width, dtype=torch.int64, device=sae.W_enc.device)
    batches = -(-config.buffer_tokens // config.token_batch_size)
    for _ in range(batches):
        values, indices = sae.encode(sampler.draw(config.token_batch_size, generator))
        counts += torch.bincount(indices[values > 0], minlength=len(counts))
    return counts.float() / (batches * config.token_batch_size)


def _output_folder(config: SAETrainingConfig, output_dir: str | Path | None) -> Path | None:
    chosen = output_dir if output_dir is not None else config.output_dir
    if chosen is None and config.checkpointing_steps is not None:
        raise InvalidInputError(
            "output_dir", expected="a folder, since checkpointing_steps is set", found="None", fix="Pass output_dir."
        )
    return None if chosen is None else Path(chosen).expanduser()
