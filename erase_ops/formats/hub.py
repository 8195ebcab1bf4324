"""Adapters on the Hugging Face Hub: a local snapshot of a repository, and uploading a folder."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from expunge.erase_ops.formats.folders import check_relative
from expunge.errors import InvalidInputError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILES = ("*.safetensors", "*.json", "README.md")


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form owner/name of a repository on the Hub (and is no path with a file's suffix)."""
    return _REPO_ID.fullmatch(text) is not None and not text.endswith((".safetensors", ".json"))


def fetch(
    repo_id: str,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of a repository's snapshot, with its safetensors and JSON files (never pickled ones).

    Args:
        repo_id: owner/name.
        weight_name: the only weights' file that is needed.
        subfolder: the only folder that is needed.
        revision: branch, tag or commit.
        token: for private repositories; True for the stored one.
        cache_dir: instead of the Hub's own cache.
        local_files_only: do not ask the network.

    Returns:
        The snapshot's root; links in it lead into the same repository's blobs.

    Raises:
        InvalidInputError: if the repository, revision or files cannot be had.
        UnsafePathError: if `subfolder` or `weight_name` leads out of the repository.
    """
    prefix = "" if subfolder is None else f"{check_relative(subfolder, 'subfolder')}/"
    if weight_name is None:
        wanted = [prefix + pattern for pattern in _FILES]
        unwanted = [f"{prefix}*/*"]  # the Hub's "*" matches "/" as well: without this, a whole model would come along
    else:
        path = prefix + str(check_relative(weight_name, "weight_name"))
        wanted, unwanted = [path, f"{path.rpartition('/')[0]}/*.json".removeprefix("/")], []
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=wanted,
            ignore_patterns=unwanted,
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InvalidInputError(
            repo_id,
            expected="a local path or a repository on the Hub that can be reached",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            fix="Check the path, the name, the revision, the token and the connection.",
        ) from error
    return Path(folder)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a folder's files as one commit, creating the repository if absent.

    Returns:
        The commit's address.

    Raises:
        InvalidInputError: if the Hub refuses.
    """
    api = huggingface_hub.HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        commit = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload erasure",
            create_pr=create_pr,
        )
    except (HfHubHTTPError, HFValidationError) as error:
        raise InvalidInputError(
            repo_id,
            expected="a repository that you may write to",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            fix="Check the name and the token.",
        ) from error
    return str(commit.commit_url)


def upload_saved(save: Callable[[Path], Path], name: str, repo_id: str, **options: Any) -> str:
    """Uploads what `save` writes into a folder of this name, which is gone afterwards.

    Args:
        save: writes into the folder that it is given, and returns it.
        name: the folder's.
        repo_id, options: as of `upload`.

    Returns:
        The commit's address.

    Raises:
        InvalidInputError: if the Hub refuses.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return upload(save(Path(scratch) / name), repo_id, **options)
