"""One thread, no network, seeded; and factories of small real pipelines with random weights."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

# Triton fixes its own helper functions at import, and diffusers, transformers and peft all import it: hence first.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import numpy
import pytest
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from expunge import SPMAdapter
from expunge.erase_ops.formats.factors import Factors
from expunge.erase_ops.sites import find_sites
from expunge.erase_ops.spm.concepts import Concept

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
hypothesis.settings.register_profile("expunge", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("expunge")

# Oracles and measurements that the scripts of benchmarks/ print, under the bare names by which those import each other.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

TEXT_LENGTH = 16  # positions of the tiny text encoders, special tokens included
# Words that the tiny tokenizer knows whole; anything else is spelled in bytes.
# fmt: off
WORDS = (
    "a", "an", "the", "of", "in", "on", "with", "and", "by", "to", "style", "photo", "picture", "painting", "drawing",
    "portrait", "cat", "kitten", "dog", "puppy", "car", "panda", "tree", "house", "person", "nude", "man", "woman",
    "van", "gogh", "monet", "picasso", "starry", "night", "sofa", "beach", "red", "blue", "small", "watercolour",
)
# fmt: on
FORMS = ("{}", "a {}", "a photo of a {}", "a small {} on a sofa")  # prompts with a concept's word
BENIGN = [form.format(word) for form in FORMS for word in ("dog", "car", "tree", "house", "van gogh")]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    yield


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def make_tokenizer() -> CLIPTokenizer:
    """A real byte-level CLIPTokenizer: 256 bytes, the same closing a word, and WORDS merged from right to left."""
    symbols = _byte_symbols()
    vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[-2], pieces[-1])  # from the right: every merge ends in "</w>", so no word breaks another
            merges.append(pair)
            pieces[-2:] = ["".join(pair)]
            vocabulary.append(pieces[-1])
    vocabulary = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    merges = list(dict.fromkeys(merges))
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges, model_max_length=TEXT_LENGTH
    )


def make_text_encoder(tokenizer: CLIPTokenizer, kind: type, width: int = 32) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,  # three, so that clip_skip has something to skip
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = kind(config).eval()
    for name, parameter in encoder.named_parameters():
        if "embedding" in name:
            # transformers draws embeddings with deviation 0.02, under which all prompts look alike.
            parameter.data.normal_()
    return encoder


def make_unet(cross_attention_dim: int = 32, **overrides: Any) -> UNet2DConditionModel:
    """Three resolutions, two of them with Transformer2DModel blocks, and one more in the middle."""
    config = {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "cross_attention_dim": cross_attention_dim,
    }
    return UNet2DConditionModel(**(config | overrides)).eval()


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16,
    ).eval()


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def _tiny_sd(seed: int = 0, **unet: Any) -> StableDiffusionPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = make_tokenizer()
        pipe = StableDiffusionPipeline(
            vae=make_vae(),
            text_encoder=make_text_encoder(tokenizer, CLIPTextModel),
            tokenizer=tokenizer,
            unet=make_unet(**unet),
            scheduler=make_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tiny_sdxl(seed: int = 0, **unet: Any) -> StableDiffusionXLPipeline:
    widths = (32, 64)  # two encoders of different widths: their states are concatenated to 96
    config = {
        "cross_attention_dim": sum(widths),
        "transformer_layers_per_block": (1, 2, 1),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + widths[1],
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = make_tokenizer(), make_tokenizer()
        tokenizer_2.pad_token = "!"  # SDXL's second tokenizer pads with "!"
        pipe = StableDiffusionXLPipeline(
            vae=make_vae(),
            text_encoder=make_text_encoder(tokenizer, CLIPTextModel, widths[0]),
            text_encoder_2=make_text_encoder(tokenizer_2, CLIPTextModelWithProjection, widths[1]),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=make_unet(**(config | unet)),
            scheduler=make_scheduler(),
            add_watermarker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[[], CLIPTokenizer]:
    """Factory of the tiny pipelines' tokenizer."""
    return make_tokenizer


@pytest.fixture(scope="session")
def tiny_sd() -> Callable[..., StableDiffusionPipeline]:
    """Factory: `tiny_sd(seed=0, **unet_config)` builds a fresh float32 Stable Diffusion pipeline, 16x16 pixels."""
    return _tiny_sd


@pytest.fixture(scope="session")
def tiny_sdxl() -> Callable[..., StableDiffusionXLPipeline]:
    """Factory: `tiny_sdxl(seed=0, **unet_config)` builds a fresh float32 SDXL pipeline, 16x16 pixels."""
    return _tiny_sdxl


def _random_factors(layer: torch.nn.Module, generator: torch.Generator) -> Factors:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    down = torch.randn(1, *weight.shape[1:], generator=generator)  # [1, in] or [1, in, kh, kw]
    up = 0.3 * torch.randn(
        weight.shape[0], 1, *[1] * (weight.ndim - 2), generator=generator
    )  # [out, 1] or [out, 1, 1, 1]
    return Factors(down, up, 1.0)


@pytest.fixture(scope="session")
def tiny_spm() -> Callable[..., SPMAdapter]:
    """Factory: `tiny_spm("cat", threshold=None, seed=0)`, a random SPM for `tiny_sd()`, strong enough to be seen."""
    sites = find_sites(_tiny_sd().unet)

    def make(concept: str = "cat", *, threshold: float | None = None, seed: int = 0) -> SPMAdapter:
        generator = torch.Generator().manual_seed(seed)
        factors = {path: _random_factors(layer, generator) for path, layer in sites.items()}
        settings = {"max_train_steps": 7, "concepts": [concept]}
        return SPMAdapter(factors, [Concept(concept)], threshold=threshold, settings=settings)

    return make


@pytest.fixture(scope="session")
def spm_for() -> Callable[..., Any]:
    """Factory: `spm_for(pipe, "cat", ...)` makes an SPM with random factors, of an effect that shows, for a pipeline.

    The tiny encoders' prompts are alike (cosines around 0.95), so that under the default threshold 0.98 the concept's
    own tokens decide: a prompt with the word has gate 1, others 0.
    """
    from expunge.erase_ops.fingerprint import architecture_fingerprint, weights_fingerprint
    from expunge.erase_ops.formats.factors import Factors
    from expunge.erase_ops.gates import make_concept
    from expunge.erase_ops.sites import find_sites
    from expunge.erase_ops.spm import SPMAdapter

    def make(
        pipe: Any,
        text: str = "cat",
        *,
        seed: int = 1,
        rank: int = 1,
        strength: float = 0.5,
        threshold: float | None = 0.98,
        coverage: str = "all",
        **fields: Any,
    ) -> SPMAdapter:
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for path, layer in find_sites(pipe.unet, coverage).items():
            weight = layer.get_parameter("weight")
            down = torch.randn(rank, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
            up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator) * strength
            factors[path] = Factors(down, up, alpha=float(rank))
        family = "sdxl" if hasattr(pipe, "text_encoder_2") else "sd"
        encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if family == "sdxl" else [])]
        tokenizers = [pipe.tokenizer, *([pipe.tokenizer_2] if family == "sdxl" else [])]
        own = {"tokenizers": tokenizers, "text_encoders": encoders}
        defaults = {
            "family": family,
            "threshold": threshold,
            "base_fingerprint": architecture_fingerprint(pipe.unet),
            "text_encoder_fingerprint": weights_fingerprint(encoders, tokenizers),
        }
        return SPMAdapter(factors, [make_concept(text, neutral="", family=family, **own)], **(defaults | fields))

    return make


@pytest.fixture(scope="session")
def sae_for() -> Callable[..., Any]:
    """Factory: `sae_for(encoder, layer=1, seed=0, **config)`, an untrained autoencoder of a tiny text encoder's states.

    Its weights are those of no special case: not tied, of any norm, with all biases, encoder features of 8 a token.
    """
    from expunge.erase_ops.sae.config import SAEConfig
    from expunge.erase_ops.sae.model import SparseAutoencoder

    def make(encoder: Any, layer: int = 1, *, seed: int = 0, **config: Any) -> SparseAutoencoder:
        defaults = {"width": 256, "k": 8, "d_in": encoder.config.hidden_size, "layer": layer}
        made, generator = SAEConfig(**(defaults | config)), torch.Generator().manual_seed(seed)
        shapes = {"W_enc": (made.width, made.d_in), "b_enc": (made.width,), "b_dec": (made.d_in,)}
        tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        tensors["W_dec"] = tensors["W_enc"] + 0.1 * torch.randn(shapes["W_enc"], generator=generator)
        if made.uses_threshold:
            tensors["threshold"] = torch.rand(made.width, generator=generator)
        return SparseAutoencoder(made, tensors, firing=torch.rand(made.width, generator=generator))

    return make


@pytest.fixture(scope="session")
def itd_for(sae_for: Callable[..., Any]) -> Callable[..., Any]:
    """Factory: `itd_for(pipe, "cat", ...)`, an ItD adapter for a tiny pipeline; features and threshold are found there.

    A prompt with the concept's word is flagged, the prompts of BENIGN are not.
    """
    from expunge.erase_ops.fingerprint import weights_fingerprint
    from expunge.erase_ops.itd.adapter import ItDAdapter
    from expunge.erase_ops.itd.features import find_concepts

    def make(
        pipe: Any, *texts: str, component: str = "text_encoder", sae: Any = None, fields: Any = None, **config: Any
    ) -> ItDAdapter:
        encoder, tokenizer = getattr(pipe, component), getattr(pipe, component.replace("text_encoder", "tokenizer"))
        own = {"component": component, "fingerprint": weights_fingerprint([encoder], [tokenizer])}
        sae = sae_for(encoder, **(own | config)) if sae is None else sae
        concepts = {text: [form.format(text) for form in FORMS] for text in texts or ("cat",)}
        found = find_concepts(sae, encoder, tokenizer, concepts, remain=BENIGN, n=32)
        adapter = ItDAdapter.from_sae(sae, found, **(fields or {}))
        adapter.calibrate(BENIGN, text_encoder=encoder, tokenizer=tokenizer, target_fpr=0.0)
        return adapter

    return make


@pytest.fixture(scope="session")
def draw() -> Callable[..., Any]:
    """`draw(pipe, prompts, seed=0, **kwargs)`: latents `[images, 4, 8, 8]`, each image from its own generator."""

    def run(pipe: Any, prompt: Any = "a cat", *, seed: int = 0, **kwargs: Any) -> torch.Tensor:
        arguments = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.0} | kwargs
        given = prompt if prompt is not None else kwargs["prompt_embeds"]
        count = (1 if isinstance(given, str) else len(given)) * kwargs.get("num_images_per_prompt", 1)
        generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
        return pipe(prompt, generator=generators, **arguments).images

    return run


@pytest.fixture(scope="session")
def bake() -> Callable[..., Any]:
    """`bake(pipe, spm, gate=1.0)`: the oracle, a plain pipeline whose weights hold the erasure for good."""

    def write(pipe: Any, *adapters: Any, gate: float = 1.0) -> Any:
        for adapter in adapters:
            for path, factors in adapter.factors.items():
                weight = pipe.unet.get_submodule(path).get_parameter("weight")
                weight.data += gate * factors.delta().to(weight)
        return pipe

    return write


@pytest.fixture(scope="session")
def tiny_janus() -> Callable[..., Any]:
    """Factory of a Janus of the demo's sizes with random weights, loud enough that prompts matter, and its processor.

    Every call gives a model of its own.
    """
    from expunge.demo_ar.builder.model import new_model, new_processor

    processor = new_processor()

    def make(seed: int = 0) -> tuple[Any, Any]:
        model = new_model(processor, seed).eval()
        with torch.no_grad():
            for name, weight in model.model.language_model.named_parameters():
                if name.endswith(("proj.weight", "embed_tokens.weight")):
                    weight.mul_(4)
            model.model.generation_embeddings.weight.mul_(20)
            model.model.generation_head.vision_head.weight.mul_(20)
        return model, processor

    return make
