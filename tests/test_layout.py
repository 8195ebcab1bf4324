"""The package as it is installed, shipped and found: names, folders, import directions, the name `kernels`."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import expunge

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "erase_ops", "pipelines", "expunge")  # lowest first: a folder may import itself and those before
JUNK = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")

# What transformers 5.23 imports by name from Hugging Face's `kernels` once its version is in range.
HUB_KERNELS = """
class Named:
    def __init__(self, *args, **kwargs): pass
CUDAProperties = Device = KernelizeFallback = LayerRepository = LocalLayerRepository = ROCMProperties = Named
class Mode: TRAINING = INFERENCE = FALLBACK = 0
def use_kernel_forward_from_hub(layer_name): return lambda cls: cls
def use_kernelized_func(*functions): return lambda cls: cls
def register_kernel_mapping(*args, **kwargs): pass
get_kernel = kernelize = replace_kernel_forward_from_hub = use_kernel_mapping = register_kernel_mapping
"""

USE_HOSTS = """
import sys
from transformers import CLIPTextModel
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from transformers.utils.import_utils import is_kernels_available
print(is_kernels_available(), getattr(sys.modules.get("kernels"), "__file__", None))
import expunge.kernels
print(expunge.kernels.__name__, expunge.kernels.__file__)
"""


def run(*arguments: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules(folder: str) -> Iterator[tuple[str, Path]]:
    """Dotted name under which each file of a folder is installed."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        dotted = parts if folder == "expunge" else ("expunge", *parts)
        yield ".".join(part for part in dotted if part != "__init__"), path


def imported(module: str, path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, relative ones resolved; `from a import b` gives both a.b and a."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def folder_of(dotted: str) -> str | None:
    parts = dotted.split(".")
    if parts[0] != "expunge":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "expunge"


class TestTheNameKernels:
    """Run from the checkout's root, where Python puts our folder `kernels/` before everything installed."""

    def test_hosts_import_without_hugging_faces_package(self) -> None:
        viable, ours = run("-c", USE_HOSTS, cwd=ROOT).splitlines()
        assert viable.split()[0] == "False"
        assert ours.split() == ["expunge.kernels", str(ROOT / "kernels" / "__init__.py")]

    def test_hosts_import_hugging_faces_package_when_it_is_installed(self, tmp_path: Path) -> None:
        package = tmp_path / "kernels"
        package.mkdir()
        (package / "__init__.py").write_text(HUB_KERNELS, encoding="utf-8")
        metadata = tmp_path / "kernels-0.18.2.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n", encoding="utf-8")
        viable, ours = run("-c", USE_HOSTS, cwd=ROOT, PYTHONPATH=str(tmp_path)).splitlines()
        assert viable.split() == ["True", str(package / "__init__.py")]
        assert ours.split() == ["expunge.kernels", str(ROOT / "kernels" / "__init__.py")]

    def test_this_very_process_is_not_shadowed(self) -> None:
        assert ROOT not in {Path(entry or ".").resolve() for entry in sys.path}, (
            "run pytest itself, not python -m pytest"
        )

    def test_nobody_imports_our_folders_by_their_bare_names(self) -> None:
        bare = {
            (name, target)
            for folder in (*FOLDERS, "tests", "benchmarks")
            for name, path in modules(folder)
            for target in imported(name, path)
            if target.split(".")[0] in ("kernels", "erase_ops", "pipelines")
        }
        assert not bare


class TestImportDirections:
    @pytest.mark.parametrize("folder", FOLDERS[:-1])
    def test_a_folder_imports_only_folders_below_it(self, folder: str) -> None:
        allowed = {None, *FOLDERS[: FOLDERS.index(folder) + 1]}
        upward = {
            (name, target)
            for name, path in modules(folder)
            for target in imported(name, path)
            if folder_of(target) not in allowed
            and not target.startswith("expunge.errors")
            and target != "expunge.__version__"
        }
        assert not upward

    def test_kernels_know_tensors_only(self) -> None:
        hosts = {"diffusers", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub"}
        assert not {
            (name, target)
            for name, path in modules("kernels")
            for target in imported(name, path)
            if target.split(".")[0] in hosts
        }

    def test_the_walk_sees_imports(self, tmp_path: Path) -> None:
        sample = tmp_path / "sample.py"
        sample.write_text(
            "import a.b\nfrom .. import up\nfrom .c import d\ndef f():\n    from expunge.pipelines.erased import x\n"
        )
        found = set(imported("expunge.kernels.deep.sample", sample))
        assert found == {"a.b", "expunge.kernels.up", "expunge.kernels.deep.c.d", "expunge.pipelines.erased.x"}
        assert folder_of("expunge.pipelines.erased.x") == "pipelines"
        assert folder_of("expunge.demo") == "expunge"


class TestPublicNames:
    def test_import_loads_no_framework(self) -> None:
        code = "import expunge, sys; dir(expunge); print(*sorted(sys.modules))"
        loaded = set(run("-c", code, cwd=ROOT).split())
        assert not loaded & {"torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "triton", "typer"}

    @pytest.mark.parametrize("name", expunge.__all__)
    def test_every_public_name_resolves(self, name: str) -> None:
        value = getattr(expunge, name)
        assert value is getattr(expunge, name)
        assert name in dir(expunge)

    def test_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'eraze'"):
            _ = expunge.eraze  # type: ignore[attr-defined]


class TestCommand:
    def test_python_dash_m_from_the_root_and_from_elsewhere(self, tmp_path: Path) -> None:
        for folder in (ROOT, tmp_path):
            text = run("-m", "expunge", "--help", cwd=folder)
            for command in ("demo", "train", "generate", "info", "check"):
                assert command in text

    def test_help_loads_no_framework(self) -> None:
        code = (
            "import sys; from expunge.cli import main; sys.argv = ['expunge', 'generate', '--help']\n"
            "try:\n    main()\nexcept SystemExit:\n    print('loaded', *sorted(sys.modules))"
        )
        loaded = set(run("-c", code, cwd=ROOT).rpartition("loaded")[2].split())
        assert "typer" in loaded
        assert not loaded & {"torch", "diffusers", "transformers", "peft"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tree, so that no build folder appears in the checkout."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in (*FOLDERS, "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=JUNK)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy / name)
    command = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), ".")
    run(*command, cwd=copy)
    (path,) = out.glob("expunge-*.whl")
    return zipfile.ZipFile(path)


class TestWheel:
    def test_ships_every_file_of_the_four_folders_and_nothing_else(self, wheel: zipfile.ZipFile) -> None:
        expected = set()
        for folder in FOLDERS:
            below = ROOT / folder
            for path in below.rglob("*"):
                relative = path.relative_to(below)
                hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
                if path.is_file() and not hidden:
                    expected.add(str(Path("expunge", *(() if folder == "expunge" else (folder,)), relative)))
        shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert shipped == expected
        assert "expunge/py.typed" in shipped

    def test_declares_licence_entry_point_and_version(self, wheel: zipfile.ZipFile) -> None:
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        text = wheel.read(metadata).decode()
        assert f"Version: {expunge.__version__}\n" in text
        assert "License-Expression: Apache-2.0\n" in text
        assert "Requires-Python: >=3.11\n" in text
        assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
        assert b"expunge = expunge.cli:main" in wheel.read(metadata.replace("METADATA", "entry_points.txt"))
