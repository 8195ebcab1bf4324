"""`expunge itd find | calibrate | inspect`: concepts out of an autoencoder, their threshold, and what they fire on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from expunge.cli import options as o
from expunge.cli.prompt_files import gather
from expunge.cli.sae_training import text_encoder_of
from expunge.cli.shared import Placement, announce, command, emit, load_base, new_folder, note, out
from expunge.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.erase_ops.itd.tokens import TokenSet
    from expunge.feature_page.firing import FeatureReport

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Interpret, then deactivate: concepts out of a sparse autoencoder, with nothing trained.",
)
FEATURES_SHOWN = 8  # of a concept, where none is named


@app.command("find")
@command
def find(
    pretrained_model_name_or_path: o.Base,
    sae: o.SAE,
    erase: o.ItDConcepts,
    output_dir: o.OutputDir,
    sae_subfolder: o.SAEFolder = None,
    target: o.Target = None,
    target_file: o.TargetFile = None,
    remain: o.Remain = None,
    remain_file: o.RemainFile = None,
    benign: o.Benign = None,
    benign_file: o.BenignFile = None,
    top_n: o.TopN = 128,
    benign_share: o.BenignShare = 0.0,
    score: o.Score = "max",
    tokens: o.Tokens = "own",
    strength: o.Strength = 0.0,
    attention_mask: o.AttentionMask = False,
    revision: o.Revision = None,
    variant: o.Variant = None,
    device: o.Device = None,
    dtype: o.DType = None,
    json_output: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Find the features of concepts and write an artefact that erases them; its threshold is set by `calibrate`."""
    from expunge.erase_ops.itd.adapter import ItDAdapter
    from expunge.erase_ops.itd.features import find_concepts
    from expunge.erase_ops.sae.files import load_sae

    concepts = concept_prompts(erase, gather(target, target_file, "--target"))
    remaining, plain = gather(remain, remain_file, "--remain"), gather(benign, benign_file, "--benign")
    folder, autoencoder = new_folder(output_dir), load_sae(sae, subfolder=sae_subfolder)
    pipe = load(pretrained_model_name_or_path, Placement.choose(device, dtype), revision=revision, variant=variant)
    encoder, tokenizer = text_encoder_of(pipe, autoencoder.config.component)
    found = find_concepts(
        autoencoder, encoder, tokenizer, concepts,
        remain=remaining, benign=plain, n=top_n, benign_share=benign_share, tokens=tokens,
        attention_mask=attention_mask,
    )  # fmt: skip
    settings = {
        "top_n": top_n,
        "benign_share": benign_share,
        "prompts": {name: len(prompts) for name, prompts in concepts.items()},
        "n_remain": len(remaining),
        "n_benign": len(plain),
    }
    family = "sdxl" if "XL" in type(pipe).__name__ else "sd"
    adapter = ItDAdapter.from_sae(
        autoencoder, found, score=score, tokens=tokens, strength=strength, family=family, settings=settings
    )
    adapter.save_pretrained(folder)
    if json_output:
        features = {name: ids.tolist() for name, ids in found.items()}
        emit({"output_dir": str(folder), "features": features, "settings": settings})
        return
    out.print(concept_table(found))
    note(f"The artefact is in {folder}. Set its threshold: expunge itd calibrate {folder} --benign_file FILE ...")


def concept_table(found: Mapping[str, Tensor]) -> Table:
    """A line for each concept: how many features it has, and the first of them."""
    table = Table("concept", "features", "first of them")
    for name, ids in found.items():
        table.add_row(Text(name), str(len(ids)), ", ".join(map(str, ids[:FEATURES_SHOWN].tolist())))
    return table


def concept_prompts(concepts: Sequence[str], templates: Sequence[str]) -> dict[str, list[str]]:
    """The prompts of each concept: templates with its name in the place of {}; the name alone if there are none.

    Raises:
        InvalidInputError: if several concepts share a prompt without {}, which would tell none of them.
    """
    fixed = [template for template in templates if "{}" not in template]
    if fixed and len(concepts) > 1:
        raise InvalidInputError(
            "--target",
            expected="{} where the concept's name goes, since there are several",
            found=repr(fixed[0]),
            fix="Write {} into the prompt, or find one concept at a time.",
        )
    return {name: [template.replace("{}", name) for template in templates or ["{}"]] for name in concepts}


@app.command("calibrate")
@command
def calibrate(
    artefact: o.ItDFolder,
    pretrained_model_name_or_path: o.Base,
    benign: o.Benign = None,
    benign_file: o.BenignFile = None,
    target: o.Target = None,
    target_file: o.TargetFile = None,
    target_fpr: o.TargetFPR = 0.01,
    attention_mask: o.AttentionMask = False,
    revision: o.Revision = None,
    variant: o.Variant = None,
    device: o.Device = None,
    dtype: o.DType = None,
    json_output: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Set an artefact's threshold on benign prompts that were used for nothing else, and write how into it."""
    from expunge.erase_ops.itd.adapter import ItDAdapter

    plain = gather(benign, benign_file, "--benign")
    if not plain:
        raise InvalidInputError(
            "--benign_file", expected="benign prompts", found="none", fix="Name a file of some hundred prompts."
        )
    adapter = ItDAdapter.from_pretrained(artefact)
    named = concept_prompts(adapter.concepts, gather(target, target_file, "--target"))
    pipe = load(pretrained_model_name_or_path, Placement.choose(device, dtype), revision=revision, variant=variant)
    encoder, tokenizer = text_encoder_of(pipe, adapter.component)
    adapter.calibrate(
        plain,
        text_encoder=encoder,
        tokenizer=tokenizer,
        target_fpr=target_fpr,
        target=[prompt for prompts in named.values() for prompt in prompts],
        attention_mask=attention_mask,
    )
    adapter.save_pretrained(artefact)
    record = adapter.calibration or {}
    if json_output:
        emit({"artefact": str(artefact), "threshold": adapter.threshold, "calibration": record})
    else:
        shares = ", ".join(f"{name} {record[name]:.3f}" for name in ("realised_fpr", "recall", "auc"))
        note(f"Threshold {adapter.threshold:.6g} ({shares}) is in {artefact}")


@app.command("inspect")
@command
def inspect(
    source: o.Inspected,
    pretrained_model_name_or_path: o.Base,
    sae_subfolder: o.SAEFolder = None,
    prompt: o.Inspect = None,
    prompts_file: o.InspectFile = None,
    feature: o.Features = None,
    output_dir: o.OutputDir = Path("features"),
    shown: o.Shown = 8,
    tokens: o.LookedAt = None,
    attention_mask: o.AttentionMask = False,
    revision: o.Revision = None,
    variant: o.Variant = None,
    device: o.Device = None,
    dtype: o.DType = None,
    json_output: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Show the prompts and tokens that features fire on: a table, and a page in the output folder."""
    from expunge.feature_page.firing import examine
    from expunge.feature_page.page import render

    prompts = gather(prompt, prompts_file, "--prompt")
    if not prompts:
        raise InvalidInputError(
            "--prompts_file", expected="prompts to look at", found="none", fix="Name a file, or pass --prompt."
        )
    autoencoder, concepts, scored = opened(source, sae_subfolder)
    wanted = {str(number): [number] for number in feature} if feature else concepts
    if not wanted:
        raise InvalidInputError(
            "--feature", expected="features of the autoencoder", found="none", fix="Name them, or pass an artefact."
        )
    pipe = load(pretrained_model_name_or_path, Placement.choose(device, dtype), revision=revision, variant=variant)
    encoder, tokenizer = text_encoder_of(pipe, autoencoder.config.component)
    ids = list(dict.fromkeys(number for numbers in wanted.values() for number in numbers))
    reports = examine(
        autoencoder, encoder, tokenizer, prompts, ids,
        shown=shown, tokens=tokens or scored, attention_mask=attention_mask,
    )  # fmt: skip
    page = new_folder(output_dir) / "index.html"
    page.write_text(render(source, autoencoder.config, len(prompts), wanted, reports), encoding="utf-8")
    if json_output:
        emit({"page": str(page), "features": [report.to_dict() for report in reports]})
        return
    out.print(feature_table(reports))
    note(f"Open this page: {page.resolve()}")


def opened(source: str, subfolder: str | None = None) -> tuple[Any, dict[str, list[int]], TokenSet]:
    """The autoencoder of a folder; if it is an artefact the first features of each of its concepts and what it scores.

    Raises:
        InvalidInputError: if an artefact has only the erased rows, out of which no whole autoencoder can be made.
    """
    from expunge.erase_ops.artefact import is_artefact
    from expunge.erase_ops.itd.adapter import ItDAdapter
    from expunge.erase_ops.sae.files import load_sae

    if not is_artefact(Path(source)):
        return load_sae(source, subfolder=subfolder), {}, "own"
    adapter = ItDAdapter.from_pretrained(source)
    concepts = {name: ids[:FEATURES_SHOWN].tolist() for name, ids in adapter.concept_features.items()}
    return adapter.rows, concepts, adapter.tokens


def load(model: str, placement: Placement, *, revision: str | None, variant: str | None) -> Any:
    announce(model, placement)
    return load_base(model, placement, revision=revision, variant=variant)


def feature_table(reports: Sequence[FeatureReport]) -> Table:
    """A line for each prompt that a feature fires on, its strongest token marked."""
    table = Table("feature", "fires on", "activation", "prompt")
    for report in reports:
        label, share = str(report.feature), f"{100 * report.share:.2f} % of tokens"
        for example in report.examples:
            text = Text()
            for index, token in enumerate(example.tokens):
                style = "bold reverse" if index == example.peak else "underline" if example.acts[index] > 0 else ""
                text.append(token, style=style)
                text.append(" " if token and index + 1 < len(example.tokens) else "")
            table.add_row(label, share, f"{example.strongest:.3g}", text)
            label = share = ""
        if not report.examples:
            table.add_row(label, share, "–", Text("none of the prompts"))
        table.add_section()
    return table
