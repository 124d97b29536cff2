"""Share: models saved in folders, pushed to a hub with a card that says what they are, found there again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from torch import Tensor

from merv.checkpoints.card import model_card
from merv.checkpoints.folder import CONFIG, WEIGHTS, find_folder, read_config, save_folder, write_model
from merv.errors import CheckpointError, WeightsError
from merv.utils.hub import download, explain_hub_error, find_on_hub
from merv.utils.suggest import nearest

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@\S+)?")
BUNDLED = re.compile(r"[\w-][\w.-]*")  # the folder of a language model inside that of the model
ADVICE = "There is no folder of that name here either; pass the path of one that save_pretrained wrote."


class PretrainedMixin:
    """A model that is saved in a folder, and pushed to a hub; `from_pretrained` takes both.

    kind: what its folders say they hold.
    """

    kind: ClassVar[str]

    def config(self) -> dict[str, Any]:
        """All that `from_pretrained` needs besides tensors, as JSON."""
        raise NotImplementedError

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what was trained and how to find the rest: a small folder, whole or not at all.

        Frozen parts are named, not copied. Raises CheckpointError where an encoder has random weights, which
        nothing could load again, or where `folder` is not merv's to replace.
        """
        save_folder(folder, self.kind, self.config(), self.trainable_state_dict())

    def card(self, repo_id: str, sources: Mapping[str, str] | None = None) -> str:
        """The README.md that `push_to_hub` gives a repository that has none: what is known of the model.

        What is not known, data and results among it, is marked "to be filled in". sources: see there.
        """
        return model_card(self, repo_id, portable_config(self.config(), sources or {}))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        sources: Mapping[str, str] | None = None,
        card: str | None = None,
        commit_message: str = "Upload a model of merv",
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
    ) -> Any:
        """Upload what `save_pretrained` writes, and a card; `from_pretrained(repo_id)` loads it.

        sources: by part, `llm` or an encoder's name, where others find what was loaded from a folder
            here: "owner/name", of encoders also "owner/name@revision". Loading checks that it is the same.
        card: the text of its README.md. None: that of `card`, unless the repository has one already.
        commit_message, private, create_pr, token: of huggingface_hub. revision: a branch, made if need be.

        Gives huggingface_hub's CommitInfo; its `oid` is the revision to load exactly this.
        Raises CheckpointError where a part is known by a folder here alone, and where the hub refuses.
        """
        from huggingface_hub import HfApi

        config = portable_config(self.config(), sources or {})
        text = model_card(self, repo_id, config) if card is None else card
        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            write_model(folder, self.kind, config, self.trainable_state_dict())
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                if revision is not None and not revision.startswith("refs/"):
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                if card is not None or not api.file_exists(repo_id, "README.md", revision=revision):
                    (Path(folder) / "README.md").write_text(text, encoding="utf-8")
                return api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message,
                    revision=revision,
                    create_pr=create_pr,
                )
            except Exception as error:  # the library's errors and those of its HTTP client have no other base
                raise CheckpointError(
                    f"{repo_id} cannot be pushed to the hub: {explain_hub_error(error)}."
                ) from error


def part_sources(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By part, `llm` and each encoder, the entry of a config that says where it is."""
    llm = {"llm": config["llm"]} if "llm" in config else {}
    encoders = config.get("vision", config)["encoders"]
    return {**llm, **{str(name): saved["identity"] for name, saved in encoders.items()}}


def portable_config(config: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """A config whose parts are where `sources` says, by part, and else where they were.

    Raises CheckpointError for a part that is not there, and where one would be known by a path alone.
    """
    changed = deepcopy(dict(config))
    parts = part_sources(changed)
    for name, source in sources.items():
        if name not in parts:
            raise CheckpointError(
                f"sources= names {name!r}, which is no part.{nearest(name, parts)} "
                f"There are: {', '.join(parts)}."
            )
        if "revision" in parts[name]:
            source, _, revision = source.partition("@")
            parts[name]["revision"] = revision or None
        parts[name]["source"] = source
    here = [
        name
        for name, place in parts.items()
        if name not in sources and (not place["source"] or Path(place["source"]).is_absolute())
    ]
    if here:
        said = ", ".join(f"{name} ({parts[name]['source'] or 'made here'})" for name in here)
        raise CheckpointError(
            f"Nobody else could find {said}. Say where they do: "
            f'sources={{"{here[0]}": "owner/name"}}. Loading checks that it is the same.'
        )
    return changed


def find_model(name: str | Path) -> Path:
    """The folder of a model: `name` itself, or what the hub has as "owner/name" or "owner/name@revision".

    Of the hub, a whole commit that is in the cache is taken from there; otherwise the hub is asked, and
    the cache where it does not answer. Raises WeightsError where neither has it.
    """
    found_here = find_folder(name)
    if found_here.is_dir() or not HUB_ID.fullmatch(str(name)):
        return found_here
    repo, _, revision = str(name).partition("@")
    found = find_on_hub(repo, revision or None, [CONFIG], ADVICE)
    if found is None:
        raise WeightsError(f"{repo} is on the hub, but has no {CONFIG}: it is no model of merv.")
    folder = found.parent  # the cache's layout: …/snapshots/<commit>/<file>
    download(repo, folder.name, WEIGHTS, ADVICE)
    _fetch_llm(repo, folder)
    return folder


def bundled_llm(folder: Path, source: str) -> Path | None:
    """The folder of a language model that a model brings along in its own, or None."""
    within = folder / source
    return within if BUNDLED.fullmatch(source) and within.is_dir() else None


def _fetch_llm(repo: str, folder: Path) -> None:
    """The language model that a converted model brings along, in a folder of its own."""
    from huggingface_hub import snapshot_download

    _, config = read_config(folder)
    source = config.get("llm", {}).get("source", "/")
    if BUNDLED.fullmatch(source):
        try:
            snapshot_download(repo, revision=folder.name, allow_patterns=f"{source}/*")
        except Exception as error:  # as above
            raise WeightsError(
                f"{repo}/{source} could not be downloaded from the hub: {explain_hub_error(error)}."
            ) from error
