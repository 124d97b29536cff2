"""`save_pretrained`, `push_to_hub` and the search for a model in folders and on the hub."""

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
BUNDLED = re.compile(r"[\w-][\w.-]*")  # a language model's folder inside the model's folder
ADVICE = "No local folder has that name either. Pass the path of a folder that save_pretrained wrote."


class PretrainedMixin:
    """Saves a model to a folder and pushes it to the hub. `from_pretrained` loads both.

    Subclasses set `kind`, the name of the class that loads the folder.
    """

    kind: ClassVar[str]

    def config(self) -> dict[str, Any]:
        """Everything that `from_pretrained` needs besides tensors, as JSON values."""
        raise NotImplementedError

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by name."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the trained tensors, and the sources and hashes of the other parts.

        Unmodified pretrained weights are not copied. A trained language model or encoder is saved in full.

        Args:
            folder: The folder to write. It is written completely or not at all. An older model in it is
                replaced.

        Raises:
            CheckpointError: An encoder has random weights, which could not be loaded again; an encoder of a
                MultiEncoder was modified (only a VideoLLM saves its weights); or the folder holds something
                other than a model of merv.

        Example:
            >>> from merv import MultiEncoder
            >>> with TemporaryDirectory() as folder:
            ...     MultiEncoder(["fake"], grid=(4, 2, 2)).save_pretrained(f"{folder}/mine")
            ...     MultiEncoder.from_pretrained(f"{folder}/mine").aligner.grid
            (4, 2, 2)
        """
        save_folder(folder, self.kind, self.config(), self.trainable_state_dict())

    def card(self, repo_id: str, sources: Mapping[str, str] | None = None) -> str:
        """Return the model card that `push_to_hub` writes to a repository that has none.

        Args:
            repo_id: The model's repository, "owner/name".
            sources: As in `push_to_hub`.

        Returns:
            The text of README.md. What merv does not know, such as data and results, is marked
            "to be filled in".
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
        """Upload the content of `save_pretrained` and a model card.

        Args:
            repo_id: The repository, "owner/name". It is created if it does not exist.
            sources: Hub ids of parts that were loaded from local folders, by part: "owner/name" for `llm`,
                "owner/name" or "owner/name@revision" for an encoder's name. Loading checks their hashes.
            card: The text of README.md. None: keep the repository's own, otherwise write `card()`.
            commit_message: The commit message.
            revision: The branch to push to. It is created if it does not exist.
            private: Whether a new repository is private.
            create_pr: Whether to open a pull request instead of committing.
            token: A token of the hub. None: the one of `hf auth login` or HF_TOKEN.

        Returns:
            huggingface_hub's CommitInfo. Its `oid` is the revision that loads exactly this model.

        Raises:
            CheckpointError: A part has only a local source, or the upload failed.
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
            except Exception as error:  # errors of the hub and of its HTTP client share no other base class
                raise CheckpointError(
                    f"{repo_id} could not be pushed to the hub: {explain_hub_error(error)}."
                ) from error


def portable_config(config: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """Return a copy of a config, in which `sources` replaces the sources of some parts (part → source).

    Raises:
        CheckpointError: `sources` names an unknown part, or a part has only a local source.
    """
    portable = deepcopy(dict(config))
    parts = {"llm": portable["llm"]} if "llm" in portable else {}
    encoders = portable.get("vision", portable)["encoders"]
    parts.update({name: encoder["identity"] for name, encoder in encoders.items()})
    for name, source in sources.items():
        if name not in parts:
            raise CheckpointError(
                f"Unknown part {name!r} in sources=.{nearest(name, parts)} Available: {', '.join(parts)}."
            )
        if "revision" in parts[name]:
            source, _, revision = source.partition("@")
            parts[name]["revision"] = revision or None
        parts[name]["source"] = source
    local = [name for name, part in parts.items() if not part["source"] or Path(part["source"]).is_absolute()]
    if local:
        raise CheckpointError(
            f"These parts are only on this machine: {', '.join(local)}. Pass their hub ids: "
            f'sources={{"{local[0]}": "owner/name"}}. Loading checks that the weights are the same.'
        )
    return portable


def find_model(name: str | Path) -> Path:
    """The folder of a model, downloaded from the hub if needed.

    A full commit hash that is in the cache is loaded without a request. For other revisions the hub is asked
    first, and the cache is used if the hub cannot be reached.

    Args:
        name: A local folder, or "owner/name" or "owner/name@revision" on the hub. A local folder comes first.

    Returns:
        The folder. If there is none and `name` cannot be a hub id, `name` as a path.

    Raises:
        WeightsError: Neither the hub nor the cache has the model.
    """
    from huggingface_hub import snapshot_download

    local = find_folder(name)
    if local.is_dir() or not HUB_ID.fullmatch(str(name)):
        return local
    repo, _, revision = str(name).partition("@")
    config = find_on_hub(repo, revision or None, [CONFIG], ADVICE)
    if config is None:
        raise WeightsError(f"{repo} on the hub is not a model of merv: it has no {CONFIG}.")
    folder = config.parent  # the cache's layout: …/snapshots/<commit>/<file>
    download(repo, folder.name, WEIGHTS, ADVICE)
    source = read_config(folder)[1].get("llm", {}).get("source", "")
    if BUNDLED.fullmatch(source):
        try:
            snapshot_download(repo, revision=folder.name, allow_patterns=f"{source}/*")
        except Exception as error:  # errors of the hub and of its HTTP client share no other base class
            raise WeightsError(
                f"{repo}/{source} could not be downloaded from the hub: {explain_hub_error(error)}."
            ) from error
    return folder


def bundled_llm(folder: Path, source: str) -> Path | None:
    """The folder of a language model that is stored inside a model's folder, or None."""
    llm = folder / source
    return llm if BUNDLED.fullmatch(source) and llm.is_dir() else None
