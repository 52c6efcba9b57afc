"""Where weights lie that somebody names: a file, a folder, or what the cache of Hugging Face's hub holds of a name there."""

import os
import re
from pathlib import Path

from nnunet_csm import weights_folder
from nnunet_csm.errors import UserError

DOWNLOAD_VARIABLE = "nnUNet_csm_download"
# owner, name, and perhaps a revision: a branch, a tag or a commit
NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w.-]+))?")
# nothing else is ever fetched: no pickle, no code
FILES = [weights_folder.CONFIG, weights_folder.WEIGHTS, weights_folder.CARD]


def find_weights(wanted: str) -> Path:
    """The checkpoint or folder that a text names.

    A path that is there comes first. A name `owner/name` or `owner/name@revision` is looked up in the local cache, and on the
    hub only where the environment variable nnUNet_csm_download says so.

    Raises:
        UserError: there is nothing of that name.
    """
    path = Path(wanted)
    if path.is_file() or weights_folder.is_one(path):
        return path
    if (path / "snapshots").is_dir():
        return _snapshot(path)
    if path.is_dir():
        raise UserError(f"{path}: no {weights_folder.CONFIG} in it; expected a folder of `nnunet_csm export_weights`")
    if given := NAME.fullmatch(wanted):
        return _in_cache(given["name"], given["revision"])
    raise UserError(
        f"{wanted}: no such checkpoint; expected the path of one, a folder of `nnunet_csm export_weights`, or a name OWNER/NAME "
        f"on Hugging Face's hub"
    )


def _snapshot(repository: Path) -> Path:
    """The revision `main` of a folder `models--OWNER--NAME` of the cache, or the only one there is."""
    found = sorted(path for path in (repository / "snapshots").iterdir() if weights_folder.is_one(path))
    main = repository / "refs" / "main"
    if main.is_file():
        found = [path for path in found if path.name == main.read_text(encoding="utf-8").strip()]
    if len(found) != 1:
        raise UserError(
            f"{repository}: {len(found)} revisions with a {weights_folder.CONFIG} that could be meant, expected one; name one of "
            f"the folders in {repository / 'snapshots'}"
        )
    return found[0]


def _in_cache(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise UserError(
            f"{name}: no such path, and names on Hugging Face's hub need huggingface_hub; pip install 'nnunet_csm[hub]'"
        ) from None
    allowed = os.environ.get(DOWNLOAD_VARIABLE, "").lower() in ("1", "t", "true")
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=not allowed, allow_patterns=FILES))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        if allowed:
            raise UserError(f"{name}: could not be had from Hugging Face's hub ({str(error).splitlines()[0]})") from None
        raise UserError(
            f"{name}: no such path, and not in {constants.HF_HUB_CACHE}; the hub is not asked unless --download or "
            f"{DOWNLOAD_VARIABLE}=1 says so"
        ) from None
    if not weights_folder.is_one(folder):
        raise UserError(f"{folder}: no {weights_folder.CONFIG} in it; {name} holds no weights of `nnunet_csm export_weights`")
    return folder
