"""The model card, scores and checksums that travel with the weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from expunge.demo.builder.card import write_json
from expunge.demo_ar.builder.model import CODES, LAYERS, TOKENS, WIDTH
from expunge.demo_ar.builder.world import BACKGROUNDS, COLOURS, SHAPES, captions_record, vocabulary

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-to-image
tags: [demo, janus]
---
# Expunge's autoregressive demo model

A real Janus model, small enough to travel with a package: {size:.1f} MB. It draws {shapes} shapes in {colours} colours
on {backgrounds} backgrounds, 32 x 32 pixels, as {tokens} tokens out of {codes} codes. It exists to try, test and
measure the erasing of concepts from autoregressive models.

```python
from transformers import JanusForConditionalGeneration, JanusProcessor

model = JanusForConditionalGeneration.from_pretrained("{folder}")
processor = JanusProcessor.from_pretrained("{folder}")
inputs = processor(text=["a red star on white"], generation_mode="image", return_tensors="pt")
settings = {{"do_sample": True, "top_k": 0, "temperature": 0.3, "guidance_scale": 1.5}}
tokens = model.generate(**inputs, generation_mode="image", **settings)
pixels = model.decode_image_tokens(tokens)  # [1, 32, 32, 3], about -1..1
```

`expunge.pipelines.janus.JanusPipeline` draws with a generator, without guidance if asked, and gives PIL images.

| part | what |
|---|---|
| language_model | Llama, {layers} layers, {width} wide |
| vqmodel | 32x32x3 to 8x8 codes of unit length |
| generation_head, generation_embeddings, generation_aligner | Janus's own |
| vision_model, aligner, lm_head | as small as the class allows, **untrained**: it draws, but cannot look or talk |
| processor | one token a word, {words} words |

## Data
Rendered by the builder itself from formulas; no foreign picture, font or text was used.

## Training
VQ tokenizer: L1, colour at a quarter of the size, squared error and commitment, quantised by cosine. Language model:
cross entropy of the image tokens, 10 % of the captions saying nothing; the last cycle on pictures that were rendered
for it. Averaged weights, seeded, one thread, on a CPU.
`python -m expunge.demo_ar.builder all` does it again; other processors give other bits, so the scores below are what is
promised, not the bytes. (The bundled tokenizer was trained beside a language model of width 128, which changes the
first random numbers and nothing else.)

## Figures
{pictures} pictures at held-out seeds, guidance {guidance}, temperature {temperature}, read by a classifier that was
trained on rendered pictures and on the same through the tokenizer, never on generated ones. `scores.json` has every
class, of {per_class} pictures each.

| | mean | lowest |
|---|---|---|
| shape | {shape:.1%} | {shape_low:.1%} ({shape_name}) |
| colour | {colour:.1%} | {colour_low:.1%} ({colour_name}) |
| background | {background:.1%} | |
| shape, colour and background of a class | {whole:.1%} | {whole_low:.1%} ({whole_name}) |
| tokenizer's reconstruction of held-out pictures | {psnr:.1f} dB | |

Classifier (shape / colour): {classifier}.

## Intended use and limits
For trying and testing erasures on a laptop. It says nothing about how a method behaves on photographs.
"""


def write(output: Path, scores: dict[str, Any]) -> None:
    """Writes README.md, captions.json, scores.json and checksums.json beside the weights."""
    model, drawn = output / "model", scores["model"]
    shapes, colours, whole = drawn["per shape"], drawn["per colour"], drawn["all three, per class"]
    worst = {name: min(table, key=table.get) for name, table in (("s", shapes), ("c", colours), ("w", whole))}
    card = CARD.format(
        size=sum(f.stat().st_size for f in model.rglob("*.safetensors")) / 1e6,
        shapes=len(SHAPES),
        colours=len(COLOURS),
        backgrounds=len(BACKGROUNDS),
        tokens=TOKENS,
        codes=CODES,
        layers=LAYERS,
        width=WIDTH,
        words=len(vocabulary()),
        folder="expunge/demo_ar/model",
        pictures=drawn["pictures"],
        per_class=drawn["pictures"] // len(whole),
        guidance=drawn["guidance scale"],
        temperature=drawn["temperature"],
        shape=drawn["shape accuracy"],
        shape_low=shapes[worst["s"]],
        shape_name=worst["s"],
        colour=drawn["colour accuracy"],
        colour_low=colours[worst["c"]],
        colour_name=worst["c"],
        background=drawn["background accuracy"],
        whole=sum(whole.values()) / len(whole),
        whole_low=whole[worst["w"]],
        whole_name=worst["w"],
        psnr=scores["tokenizer"]["psnr"],
        classifier="; ".join(f"{k}: {v['shape']:.2%} / {v['colour']:.2%}" for k, v in scores["classifier"].items()),
    )
    (model / "README.md").write_text(card, encoding="utf-8")
    write_json(output / "captions.json", captions_record())
    write_json(model / "scores.json", scores)
    weights = sorted([*model.rglob("*.safetensors"), *(output / "classifier").rglob("*.safetensors")])
    digests = {str(f.relative_to(output)): hashlib.sha256(f.read_bytes()).hexdigest() for f in weights}
    write_json(output / "checksums.json", digests)
