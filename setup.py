"""Maps the folders at the top of the repository into one package; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = ("kernels", "erase_ops", "pipelines")
ENDINGS = ("json", "safetensors", "txt", "yaml", "j2", "md")
DATA = ("py.typed", *(f"**/*.{ending}" for ending in ENDINGS), "**/LICENSE*", "**/NOTICE*")


def tree(folder: str, package: str) -> list[str]:
    return [package, *(f"{package}.{below}" for below in find_packages(folder))]


setup(
    packages=tree("expunge", "expunge") + [name for folder in FOLDERS for name in tree(folder, f"expunge.{folder}")],
    package_dir={f"expunge.{folder}": folder for folder in FOLDERS},
    package_data={"": list(DATA)},
)
