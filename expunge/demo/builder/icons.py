"""Fetches the icon sets from their npm packages, checks version, content and licence, and renders drawings.

The packages hold one `icons.json` each with SVG bodies under the same English names, so that no matching is needed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RENDER_SIZE = 160  # pixels; drawings are rendered once at this size and scaled down by the augmentations


@dataclass(frozen=True)
class IconSet:
    """One npm package of icons; `integrity` is the sha512 that pins the very bytes."""

    package: str
    version: str
    licence: str
    attribution: str
    source: str
    integrity: str


ICON_SETS: dict[str, IconSet] = {
    "noto": IconSet(
        "@iconify-json/noto",
        "1.2.9",
        "Apache-2.0",
        "Noto Emoji, Copyright Google Inc.",
        "https://github.com/googlefonts/noto-emoji",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "fluent": IconSet(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "Fluent Emoji (flat), Copyright Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "silhouette": IconSet(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "MIT",
        "Fluent Emoji (high contrast), Copyright Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        "sha512-esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
    ),
}


def fetch(folder: Path) -> None:
    """Downloads the three packages into `folder` with npm; refuses other bytes and other licences.

    Raises:
        ValueError: a package's bytes or licence are not the ones this builder was written for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for icon_set in ICON_SETS.values():
        archive = archive_path(folder, icon_set)
        if not archive.exists():
            command = ["npm", "pack", f"{icon_set.package}@{icon_set.version}", "--silent"]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        digest = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != icon_set.integrity:
            raise ValueError(f"{archive.name}: expected {icon_set.integrity}, found {digest}. Fetch it again.")
        package = read_member(archive, "package.json")
        info = read_member(archive, "info.json")
        found = {package["license"], info["license"]["spdx"]}
        if found != {icon_set.licence}:
            raise ValueError(f"{archive.name}: expected licence {icon_set.licence}, found {sorted(found)}.")


def archive_path(folder: Path, icon_set: IconSet) -> Path:
    return folder / f"{icon_set.package.removeprefix('@').replace('/', '-')}-{icon_set.version}.tgz"


def read_member(archive: Path, name: str) -> dict[str, Any]:
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"package/{name}")
        if member is None:
            raise ValueError(f"{archive.name}: expected a file package/{name}, found none.")
        record: dict[str, Any] = json.load(member)
        return record


def render(icons: dict[str, Any], name: str) -> np.ndarray:
    """The drawing `name` as float32 RGBA in 0..1, [RENDER_SIZE, RENDER_SIZE, 4], straight alpha."""
    import io

    import cairosvg
    from PIL import Image

    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    png = cairosvg.svg2png(svg.encode(), output_width=RENDER_SIZE, output_height=RENDER_SIZE)
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGBA"), np.float32) / 255.0


def render_all(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Icon set -> [len(names), RENDER_SIZE, RENDER_SIZE, 4] float32 RGBA drawings."""
    drawings = {}
    for key, icon_set in ICON_SETS.items():
        icons = read_member(archive_path(folder, icon_set), "icons.json")
        drawings[key] = np.stack([render(icons, name) for name in names])
    return drawings
