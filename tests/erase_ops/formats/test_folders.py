"""Safe names and paths, and saves that a crash cannot tear."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge.erase_ops.formats import folders
from expunge.erase_ops.formats.folders import (
    PENDING,
    check_name,
    check_relative,
    locate,
    replace_file,
    slug,
    subfolder_of,
    write_folder,
)
from expunge.errors import AdapterFormatError, InvalidInputError, UnsafePathError


@given(st.text(max_size=200))
def test_a_slug_is_always_a_valid_name(text: str) -> None:
    assert check_name(slug(text)) == slug(text)


def test_slugs_stay_readable() -> None:
    assert slug("Van Gogh") == "Van-Gogh"
    assert slug("Dalí, Salvador") == "Dali-Salvador"
    assert slug("梵高") == "adapter"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a.b", "-a", " a", "a\0", "a" * 65, "ä"])
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(UnsafePathError):
        check_name(name)


@pytest.mark.parametrize("path", ["", "/etc", "..", "a/../../b", "a\\..\\b", "C:x", "a\0b"])
def test_unsafe_relative_paths_are_refused(path: str) -> None:
    with pytest.raises(UnsafePathError):
        check_relative(path, "subfolder")


def test_subfolders(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert subfolder_of(tmp_path, None) == tmp_path
    assert subfolder_of(tmp_path, "a/b") == tmp_path / "a" / "b"
    with pytest.raises(AdapterFormatError, match="subfolder 'c'"):
        subfolder_of(tmp_path, "c")


def test_links_may_lead_around_a_hub_snapshot_only(tmp_path: Path) -> None:
    repo = tmp_path / "models--a--b"
    snapshot, blobs = repo / "snapshots" / "1", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "x").write_bytes(b"1")
    (tmp_path / "secret").write_bytes(b"2")
    (snapshot / "x").symlink_to("../../blobs/x")
    (snapshot / "y").symlink_to(tmp_path / "secret")
    found = locate(snapshot, "x")
    assert found is not None and found.read_bytes() == b"1"
    with pytest.raises(UnsafePathError, match="a link to"):
        locate(snapshot, "y")


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(b"mine")
    write_folder(tmp_path, {"a": b"1"})
    write_folder(tmp_path, {"a": b"2", "b": b"3"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"mine.txt": b"mine", "a": b"2", "b": b"3"}


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"keep")
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path / "outside")
    write_folder(folder, {"a": b"new"})
    assert (tmp_path / "outside").read_bytes() == b"keep"
    assert (folder / "a").read_bytes() == b"new" and not (folder / "a").is_symlink()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    with pytest.raises(InvalidInputError, match="found a file"):
        write_folder(tmp_path / "f", {"a": b""})
    assert (tmp_path / "f").read_bytes() == b"x"


OLD = {"a": b"old a", "b": b"old b", "c": b"old c"}
NEW = {"a": b"new a", "b": b"new b", "c": b"new c"}
CALLS = ("rename", "replace", "fsync")


def read_all(folder: Path) -> dict[str, bytes]:
    paths = {name: locate(folder, name) for name in OLD}
    return {name: path.read_bytes() for name, path in paths.items() if path is not None}


@pytest.mark.parametrize("step", range(12))
def test_a_killed_save_leaves_old_or_new(tmp_path: Path, step: int) -> None:
    """The process dies at its step-th change of the file system; readers then see one save, whole."""
    write_folder(tmp_path, OLD)
    code = f"""
import os
from pathlib import Path
from expunge.erase_ops.formats.folders import write_folder
left = {step}
def dying(call):
    def run(*args):
        global left
        if left == 0:
            os._exit(9)
        left -= 1
        return call(*args)
    return run
for name in {CALLS}:
    setattr(os, name, dying(getattr(os, name)))
write_folder(Path({str(tmp_path)!r}), {NEW})
"""
    status = subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode
    assert status == (9 if step < 10 else 0)
    assert read_all(tmp_path) == (NEW if step > 4 else OLD)  # the fifth change is the commit
    write_folder(tmp_path, NEW)
    assert read_all(tmp_path) == NEW and not (tmp_path / PENDING).exists()


def test_a_failed_save_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, OLD)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_folder(tmp_path, NEW)
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "a", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == OLD


def test_one_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    replace_file(path, b"1")
    replace_file(path, b"2")
    assert [entry.name for entry in path.parent.iterdir()] == ["a"] and path.read_bytes() == b"2"
    assert os.stat(path).st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
