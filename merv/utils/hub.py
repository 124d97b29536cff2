"""Files of Hugging Face repositories: from the local cache, or downloaded into it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from merv.errors import WeightsError

COMMIT = re.compile("[0-9a-f]{40}")
TRANSFORMERS_WEIGHTS = (  # best first
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
SMALL_FILE = re.compile(r"[^/]+\.(json|jinja|model|txt)")  # config, tokenizer and chat template
ADVICE = (
    'If you have the weights, pass weights="/path/to/folder" (or a file). weights=None initializes randomly.'
)


def find_on_hub(repo: str, revision: str | None, names: Sequence[str], advice: str = ADVICE) -> Path | None:
    """Find the first file of a list that a repository has, and download it if needed.

    If `revision` is a full commit hash and the cache has one of the files, there is no request. Otherwise the
    hub is asked first, because a branch may have moved; the cache is used only if the hub does not answer.

    Args:
        repo: The id of the repository, "owner/name".
        revision: Branch, tag or commit; None for the main branch.
        names: File names, best first.
        advice: The last sentence of the error.

    Returns:
        The path of the file in the cache; None if the repository has none of the files.

    Raises:
        WeightsError: Neither the hub nor the cache has the repository.

    Example:
        >>> find_on_hub("some one/model", None, ["model.safetensors"])
        Traceback (most recent call last):
        merv.errors.WeightsError: 'some one/model' is neither a path nor a valid hub id; ...
    """
    cached = _in_cache(repo, revision, names)
    if cached is not None and revision and COMMIT.fullmatch(revision):
        return cached
    try:
        available = _list_files(repo, revision)
    except Exception as error:  # errors of huggingface_hub and of its HTTP client share no other base class
        if cached is None:
            raise _download_error(repo, revision, names, error, advice) from error
        return cached
    best = next((name for name in names if name in available), None)
    return None if best is None else download(repo, revision, best, advice)


def _in_cache(repo: str, revision: str | None, names: Sequence[str]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        paths = [try_to_load_from_cache(repo, name, revision=revision) for name in names]
    except HFValidationError as error:
        raise WeightsError(
            f"{repo!r} is neither a path nor a valid hub id; expected 'owner/name': {error}"
        ) from error
    return next((Path(path) for path in paths if isinstance(path, str)), None)


def _list_files(repo: str, revision: str | None) -> set[str]:
    """List the files of a repository with one request and no retries.

    If the hub cannot be reached, this fails at once; hf_hub_download retries for 23 seconds.
    """
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return {file.rfilename for file in info.siblings or ()}


def download(repo: str, revision: str | None, name: str, advice: str = ADVICE) -> Path:
    """Download a file of a repository into the cache, unless it is there; return its path.

    Raises WeightsError if the download fails. `advice` is the last sentence of the error.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except Exception as error:  # errors of huggingface_hub and of its HTTP client share no other base class
        raise _download_error(repo, revision, [name], error, advice) from error


def find_transformer(repo: str, advice: str = ADVICE) -> Path:
    """Find the folder of a model of transformers in the cache; what is missing there is downloaded.

    The newest commit is asked for with one request. If the hub does not answer, the cache is used as it is.

    Args:
        repo: The id of the repository, such as "owner/name".
        advice: The last sentence of the error.

    Returns:
        A folder with config, tokenizer and weights; of several formats of weights only the best.

    Raises:
        WeightsError: Neither the hub nor the cache has the repository, or it has no weights.
    """
    path = find_on_hub(repo, None, TRANSFORMERS_WEIGHTS, advice)
    if path is None:
        raise WeightsError(
            f"{repo} on the hub has none of {', '.join(TRANSFORMERS_WEIGHTS)}; it is not a model of "
            f"transformers. {advice}"
        )
    folder = path.parent  # the cache's layout: …/snapshots/<commit>/<file>
    names: set[str] = set()
    if path.suffix == ".json":
        try:
            names = set(json.loads(path.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(
                f"{path} is damaged ({type(error).__name__}: {error}). Delete it, to download it "
                f"again. {advice}"
            ) from error
    with suppress(Exception):  # errors of the hub and of its HTTP client share no other base class
        names |= {name for name in _list_files(repo, folder.name) if SMALL_FILE.fullmatch(name)}
    for name in sorted(names):
        download(repo, folder.name, name, advice)
    return folder


def explain_hub_error(error: Exception) -> str:
    """Say why a request to the hub failed, and what to do."""
    from huggingface_hub import errors

    reasons: dict[type[Exception], str] = {
        errors.GatedRepoError: "the repository is gated; accept its terms on its page, then run "
        "`hf auth login` or set HF_TOKEN",
        errors.RevisionNotFoundError: "the repository does not have this revision",
        errors.RepositoryNotFoundError: "there is no such repository, or it is private; for a private one "
        "run `hf auth login` or set HF_TOKEN",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
    }
    for kind, reason in reasons.items():
        if isinstance(error, kind):
            return reason
    first_line = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")
    return f"{type(error).__name__}: {first_line}"


def _download_error(
    repo: str, revision: str | None, names: Sequence[str], error: Exception, advice: str
) -> WeightsError:
    from huggingface_hub import constants

    full_name = repo if revision is None else f"{repo}@{revision}"
    return WeightsError(
        f"The weights {full_name} could not be downloaded from the hub: {explain_hub_error(error)}. "
        f"The cache {constants.HF_HUB_CACHE} does not contain {' or '.join(names)}. {advice}"
    )
