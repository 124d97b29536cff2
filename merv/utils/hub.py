"""Hub: files of Hugging Face repositories, from its cache or fetched into it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from merv.errors import WeightsError

COMMIT = re.compile("[0-9a-f]{40}")
ADVICE = 'Where you have them, pass weights="/path/to/folder" (or file); weights=None makes random ones.'


def find_on_hub(repo: str, revision: str | None, names: Sequence[str], advice: str = ADVICE) -> Path | None:
    """The first of `names` that the repository has at that revision, in the cache; None if it has none.

    A whole commit that is in the cache is taken from there. Otherwise the hub is asked first, and the
    cache only where it does not answer: a branch may have moved. Raises WeightsError where neither has it;
    `advice` ends its message.

    >>> find_on_hub("some one/model", None, ["model.safetensors"])
    Traceback (most recent call last):
    merv.errors.WeightsError: 'some one/model' is neither a path nor an id of the hub: ...
    """
    found = _in_cache(repo, revision, names)
    if found is not None and revision and COMMIT.fullmatch(revision):
        return found
    try:
        there = _listing(repo, revision)
    except Exception as error:  # the library's errors and those of its HTTP client have no other base
        if found is None:
            raise _no_hub(repo, revision, names, error, advice) from error
        return found
    best = next((name for name in names if name in there), None)
    return None if best is None else download(repo, revision, best, advice)


def _in_cache(repo: str, revision: str | None, names: Sequence[str]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(repo, name, revision=revision) for name in names]
    except HFValidationError as error:
        raise WeightsError(f"{repo!r} is neither a path nor an id of the hub: {error}") from error
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _listing(repo: str, revision: str | None) -> set[str]:
    """The names of the files that are on the hub.

    One request without retries, which also tells whether there is a hub to be reached: without one,
    hf_hub_download tries for 23 seconds to say so.
    """
    from huggingface_hub import HfApi, constants

    found = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return {file.rfilename for file in found.siblings or ()}


def download(repo: str, revision: str | None, name: str, advice: str = ADVICE) -> Path:
    """One file of a repository, in the cache; fetched, if it is not there.

    Raises WeightsError where it cannot be loaded.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except Exception as error:  # as above
        raise _no_hub(repo, revision, [name], error, advice) from error


def explain_hub_error(error: Exception) -> str:
    """What the hub, or the way there, has against it, and what to do."""
    from huggingface_hub import errors

    reasons: dict[type[Exception], str] = {
        errors.GatedRepoError: "its owner wants to be asked; accept the terms on its page, then type "
        "`hf auth login` or set HF_TOKEN",
        errors.RevisionNotFoundError: "it has no such revision",
        errors.RepositoryNotFoundError: "there is no such repository, or it is private; for a private one "
        "type `hf auth login` or set HF_TOKEN",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
    }
    first_line = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")
    kind = next((kind for kind in reasons if isinstance(error, kind)), None)
    return reasons[kind] if kind else f"{type(error).__name__}: {first_line}"


def _no_hub(
    repo: str, revision: str | None, names: Sequence[str], error: Exception, advice: str
) -> WeightsError:
    from huggingface_hub import constants

    asked = repo if revision is None else f"{repo}@{revision}"
    return WeightsError(
        f"The weights {asked} could not be downloaded from the hub: {explain_hub_error(error)}. "
        f"Nor is {' or '.join(names)} in the cache, {constants.HF_HUB_CACHE}. {advice}"
    )
