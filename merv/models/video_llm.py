"""VideoLLM: a causal language model of transformers with visual tokens from a MultiEncoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from merv.checkpoints.config_schema import invalid_config
from merv.checkpoints.folder import CONFIG, fill_exactly, load_folder
from merv.checkpoints.pretrained import PretrainedMixin, bundled_llm, find_model
from merv.errors import CheckpointError, PromptError, ShapeError
from merv.features.store import FeatureStore
from merv.fusion.fusion import Fusion
from merv.models.chat import NOT_LEARNED, Conversation, Prompt, Visual, to_texts
from merv.models.chat_template import ChatTemplate, check_tokenizer, restore_template
from merv.models.generation import GenerationMixin
from merv.models.llm import (
    LoraOptions,
    check_llm,
    check_same,
    config_allows_shared_prefix,
    identity,
    load_llm,
    logits_of,
)
from merv.models.multi_encoder import Encoded, MultiEncoder, source_key
from merv.models.outputs import VideoLLMOutput, VisualTokens
from merv.models.packing import Packed, pack, tokens_of
from merv.models.trainable import TrainablePartsMixin

FUSION = "vision.fusion."  # prefix of the tensors of the fusion in a checkpoint


class VideoLLM(GenerationMixin, TrainablePartsMixin, PretrainedMixin):
    """A causal language model that answers questions about videos and images.

    Tokens of a new MultiEncoder have a root mean square of 1. Before training a new model with a loop of your
    own, set it to that of the LLM's embeddings with `model.fusion.init_scale(rms)`, as `merv fit` does; see
    examples/plain_torch.py. At first only projectors and mixer are trainable: the constructor freezes the LLM
    and all encoders. Change that with `train_only`.

    Args:
        llm: Causal language model of transformers, for example from `merv.models.llm.load_llm`.
        tokenizer: Its tokenizer.
        vision: MultiEncoder whose `output_dim` is the embedding dimension of the LLM.
        feature_store: Store for aligned features. With a store, each video is encoded only once.
        chat_template_kwargs: Variables of the tokenizer's chat template, e.g. {"enable_thinking": False}.

    Raises:
        ShapeError: The `output_dim` of `vision` is not the embedding dimension of the LLM.
        WeightsError: The LLM cannot work with visual tokens.
        PromptError: Answers have no end token.

    Example:
        >>> from merv.testing import tiny_llm
        >>> llm, tokenizer = tiny_llm()
        >>> vision = MultiEncoder(["fake"], grid=(2, 2, 2), output_dim=llm.config.hidden_size)
        >>> model = VideoLLM(llm, tokenizer, vision).eval()
        >>> video = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
        >>> from merv.models.chat import user_message
        >>> len(model.generate([user_message("What is this?", video)], max_new_tokens=4))
        1
        >>> model([[user_message("What is this?", video, answer="Nothing.")]]).loss.shape
        torch.Size([])
    """

    kind = "VideoLLM"

    def __init__(
        self,
        llm: Any,
        tokenizer: Any,
        vision: MultiEncoder,
        feature_store: FeatureStore | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        embed_dim = llm.get_input_embeddings().embedding_dim
        output_dim = None if vision.fusion is None else vision.fusion.output_dim
        if output_dim != embed_dim:
            raise ShapeError(
                f"Expected a MultiEncoder with output_dim={embed_dim}, the embedding dimension of the LLM; "
                f"got output_dim={output_dim}."
            )
        self.llm, self.tokenizer, self.vision = llm, tokenizer, vision
        self.feature_store = feature_store
        self.chat = ChatTemplate(tokenizer, chat_template_kwargs)
        self.chat.check()
        self._shared_prefix_is_exact = check_llm(llm)
        self.llm_identity = identity(llm)
        self.train_only(("projector", "mixer"))

    # From conversations to logits ---------------------------------------------------------

    def forward(
        self, groups: Sequence[Sequence[Conversation]], packed_length: int | None = None
    ) -> VideoLLMOutput:
        """Predict the tokens of the answers.

        Args:
            groups: Groups of conversations with answers. The conversations of a group are about the same
                video. If the attention of the LLM allows it (`merv.models.llm.check_llm`), they share a row
                in which the video occurs once. Without groups, the loss and all gradients are zero, so that a
                process without data can take part in a step.
            packed_length: Put several groups into one row of at most this many tokens.

        Returns:
            The logits and labels of the answers; the property `loss` is the training loss.

        Raises:
            PromptError: A conversation has no answer.
        """
        prompts = self.render(groups) or [[Prompt([self.pad_id] * 2, [False] * 2)]]  # messages → token ids
        packed, visual = self.prepare(prompts, packed_length=packed_length)  # rows for the LLM
        keep = _positions_before_answers(packed)
        logits = self.logits(packed, visual.tokens, keep)
        return VideoLLMOutput(
            logits.float(),
            packed.labels[:, keep + 1],
            packed.conversations[:, keep + 1],
            visual.mix_weights,
        )

    def render(self, groups: Sequence[Sequence[Conversation]]) -> list[list[Prompt]]:
        """Return the sequences of each row: a row per group, or per sequence if the LLM cannot share rows."""
        rows: list[list[Prompt]] = []
        numbers = count()
        for group in groups:
            row: list[Prompt] = []
            for messages in group:
                number = next(numbers)
                row += [
                    replace(prompt, conversation=number) for prompt in self.chat.training_prompts(messages)
                ]
            rows += [row] if self.supports_shared_prefix else [[prompt] for prompt in row]
        return rows

    def encode_visuals(self, prompts: Sequence[Sequence[Prompt]]) -> VisualTokens:
        """Return the tokens of all videos and images in the prompts."""
        visuals = [visual for row in prompts for prompt in row for visual in prompt.visuals]
        if not visuals:  # the fusion still needs gradients, and takes part in collective operations
            return VisualTokens(self.fusion.dummy_tokens()[:0].to(self.device), [], {})
        keys = [(source_key(v.source), v.question if self.fusion.mixer.conditioned else "") for v in visuals]
        distinct = dict(zip(keys, visuals, strict=True))
        fused = self._encode_and_fuse(list(distinct.values())).fused
        ends = fused.mask.sum(dim=1).cumsum(0).tolist()
        ranges = {key: range(start, end) for key, start, end in zip(distinct, [0, *ends], ends, strict=False)}
        mix_weights = _mean_weights(fused.mix_weights, self.fusion.names)
        return VisualTokens(fused.tokens[fused.mask], [ranges[key] for key in keys], mix_weights)

    def prepare(
        self,
        prompts: Sequence[Sequence[Prompt]],
        *,
        side: Literal["left", "right"] = "right",
        packed_length: int | None = None,
        room: int = 0,
    ) -> tuple[Packed, VisualTokens]:
        """Encode the videos of prompts, and pack token ids and visual tokens into the LLM's input.

        Args:
            prompts: The sequences of each row.
            side: Side of the padding.
            packed_length: As in `forward`.
            room: How many more tokens have to fit into the LLM's context.

        Raises:
            PromptError: A sequence is longer than the LLM's context.
        """
        visual = self.encode_visuals(prompts)  # videos → tokens: read, encode, align, fuse
        ranges = iter(visual.ranges)
        sequences = [[tokens_of(prompt, ranges) for prompt in row] for row in prompts]
        longest = max(len(tokens.ids) for row in sequences for tokens in row)
        if self.max_length is not None and longest + room > self.max_length:
            raise PromptError(
                f"A conversation has {longest} tokens with its videos, but the context of the LLM is "
                f"{self.max_length}. Use a coarser grid, shorter texts, or an LLM with a longer context."
            )
        return pack(sequences, self.pad_id, side, packed_length).to(self.device), visual

    def embed_prompts(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """Return the input of `llm.generate` for the next answer of each conversation, padded on the left.

        Raises:
            PromptError: A conversation is malformed or leaves no room in the LLM's context.
        """
        prompts = [[self.chat.generation_prompt(messages)] for messages in conversations]
        packed, visual = self.prepare(prompts, side="left", room=1)
        embeddings = packed.embed(self.llm.get_input_embeddings(), visual.tokens)
        return {"inputs_embeds": embeddings, "attention_mask": packed.mask.long()}

    def logits(self, packed: Packed, visual: Tensor, keep: Tensor) -> Tensor:
        """Return the logits [B, K, vocabulary] at the positions `keep` [K] of each row."""
        return logits_of(self.llm, packed, visual, keep)

    def encode(self, conversation: Conversation) -> Encoded:
        """Encode the videos and images of one conversation.

        Args:
            conversation: Messages; an answer is not needed.

        Returns:
            Features, tokens and mix weights, with one entry in the batch for each video, in order.

        Raises:
            PromptError: The conversation has no video or image.
        """
        _, visuals = to_texts(conversation)
        if not visuals:
            raise PromptError(
                f"Expected a conversation with a video or image, got {str(conversation)[:200]}."
            )
        return self._encode_and_fuse(visuals)

    def _encode_and_fuse(self, visuals: Sequence[Visual]) -> Encoded:
        question = None
        if self.fusion.mixer.conditioned:
            question = self._embed_questions([visual.question for visual in visuals])
        return self.vision([visual.source for visual in visuals], question, store=self.feature_store)

    def _embed_questions(self, questions: Sequence[str]) -> Tensor:
        """Return the mean embedding of each question's tokens, [B, L]."""
        table = self.llm.get_input_embeddings()
        ids = [self.tokenizer(q or " ", add_special_tokens=False).input_ids for q in questions]
        return torch.stack([table(torch.tensor(row, device=self.device)).mean(dim=0) for row in ids])

    @property
    def pad_id(self) -> int:  # type: ignore[override]
        """Id of the padding token; it is masked, so the end token is used if the tokenizer has none."""
        pad_id = self.tokenizer.pad_token_id
        return self.chat.end_id if pad_id is None else pad_id

    @property
    def supports_shared_prefix(self) -> bool:
        """Whether conversations about one video share a row; see `merv.models.llm.check_llm`."""
        return self._shared_prefix_is_exact and config_allows_shared_prefix(self.llm)

    @property
    def max_length(self) -> int | None:  # type: ignore[override]
        """Length of the LLM's context in tokens; None if it has no limit."""
        return getattr(self.llm.config.get_text_config(), "max_position_embeddings", None)

    @property
    def fusion(self) -> Fusion:  # type: ignore[override]
        """Projectors and mixer of the MultiEncoder."""
        assert self.vision.fusion is not None
        return self.vision.fusion

    @property
    def device(self) -> torch.device:
        """Device of the LLM."""
        return self.llm.get_input_embeddings().weight.device

    # Scores of given answers, without generating ------------------------------------------

    @torch.no_grad()
    def log_probs(self, conversations: Sequence[Conversation]) -> list[Tensor]:
        """Compute the log-probability of each token of the given answers.

        Args:
            conversations: Conversations with at least one answer of the assistant.

        Returns:
            A tensor of shape [tokens] for each conversation, in float32.

        Raises:
            PromptError: A conversation has no answer.
        """
        out = self([[conversation] for conversation in conversations])
        log_probs = out.logits.log_softmax(dim=-1).gather(2, out.labels.clamp(min=0)[..., None])[..., 0]
        is_answer = out.labels != NOT_LEARNED
        return [log_probs[is_answer & (out.conversations == n)] for n in range(len(conversations))]

    def exact_match(self, groups: Sequence[Sequence[Conversation]]) -> list[list[bool]]:
        """Check whether greedy decoding would give exactly the answer of each conversation and then stop.

        This takes one forward pass and no generation, because the first token that differs decides.

        Args:
            groups: Conversations with answers, grouped as in `forward`.

        Returns:
            For each group, True or False for each of its conversations.

        Raises:
            PromptError: A conversation has no answer.
        """
        return self.score_batch(groups)[0]

    @torch.no_grad()
    def score_batch(
        self, groups: Sequence[Sequence[Conversation]]
    ) -> tuple[list[list[bool]], VideoLLMOutput]:
        """Return what `exact_match` and `forward` return, in one pass."""
        out = self(groups)
        is_wrong = (out.logits.argmax(dim=-1) != out.labels) & (out.labels != NOT_LEARNED)
        failed = set(out.conversations[is_wrong].tolist())
        numbers = count()
        return [[next(numbers) not in failed for _ in group] for group in groups], out

    # Saving -------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """Return everything that `from_pretrained` needs besides tensors, as a dict of JSON values.

        Raises:
            CheckpointError: An encoder has random weights, which cannot be loaded again, or the mixer, a
                projector or the aligner was replaced.
        """
        return {
            "llm": {**self.llm_identity, "dtype": str(self.llm.dtype).removeprefix("torch.")},
            "tokenizer": self.chat.identity(),
            "lora": None
            if self.lora is None
            else {**vars(self.lora), "target_modules": list(self.lora.target_modules)},
            "trained": list(self.trained),
            "modified_parts": sorted(self.modified_parts()),
            "vision": self.vision.config(),
        }

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        llm: str | Path | None = None,
        weights: Mapping[str, str | None] | None = None,
        dtype: str | torch.dtype | None = None,
        quantize: str | None = None,
        feature_store: FeatureStore | None = None,
        verify: bool | None = None,
    ) -> VideoLLM:
        """Load a model that was saved by `save_pretrained` or pushed by `push_to_hub`.

        Args:
            folder: A folder, or "owner/name" or "owner/name@revision" of the hub.
            llm: Folder or hub id of the language model, if it has moved.
            weights: Encoder name → where its weights are, for encoders whose weights have moved.
            dtype: Dtype of the LLM, as in `load_llm`. Defaults to the saved one.
            quantize: Quantize the weights of the LLM: "nf4" or "int8"; see `load_llm`.
            feature_store: Store for aligned features.
            verify: Compare the files of the folder with the SHA-256 that they had when the model was saved.
                True: all files. None: files of up to 256 MiB, which takes at most a second. False: none.

        Returns:
            The model in eval mode.

        Raises:
            CheckpointError: The folder is not a saved VideoLLM, is damaged, or the LLM or an encoder has
                other weights than when the model was saved.
            WeightsError: The model, the LLM or the weights of an encoder could not be loaded.
            PluginError: The model names a class that is neither registered nor imported.
        """
        folder = find_model(folder)
        config, state = load_folder(folder, cls.kind, verify)
        lora = _saved_lora(config["lora"], state, folder / CONFIG)
        saved_llm = config["llm"]
        source = llm or bundled_llm(folder, saved_llm["source"]) or saved_llm["source"]
        network, tokenizer = load_llm(source, dtype or saved_llm["dtype"], quantize)
        fusion = {
            name.removeprefix(FUSION): tensor for name, tensor in state.items() if name.startswith(FUSION)
        }
        vision = MultiEncoder.from_config(config["vision"], weights or {}, fusion, folder / CONFIG)
        options = restore_template(tokenizer, config["tokenizer"], source)
        model = cls(network, tokenizer, vision, feature_store, chat_template_kwargs=options)
        check_tokenizer(config["tokenizer"], model.chat.identity(), folder)
        check_same(saved_llm, model.llm_identity, folder)
        with invalid_config(folder / CONFIG):
            if lora is not None:
                model.add_lora(lora)
            model.train_only(config["trained"])
        model._load_saved(state, config["modified_parts"], folder)
        return model.eval()

    def _load_saved(self, state: Mapping[str, Tensor], modified: Sequence[str], folder: Path) -> None:
        """Copy the saved tensors into the model; `modified` names the pretrained parts among them."""
        if unknown := sorted(set(modified) - {"llm", *self.vision.encoders}):
            raise CheckpointError(
                f"{folder / CONFIG}: modified_parts has unknown parts {', '.join(unknown)}."
            )
        fill_exactly(self.trainable_state_dict(modified), state, folder)
        self._llm_modified |= "llm" in modified
        for name, encoder in self.vision.named():
            if name in modified:
                encoder.mark_modified()


def _saved_lora(
    options: Mapping[str, Any] | None, state: Mapping[str, Tensor], where: Path
) -> LoraOptions | None:
    """Return the options of the saved LoRA. Its rank must be that of the saved tensors."""
    if options is None:
        return None
    ranks = {tuple(tensor.shape[:1]) for name, tensor in state.items() if ".lora_A." in name}
    if ranks != {(options["r"],)}:
        raise CheckpointError(f"{where}: lora.r is {options['r']}, but the saved tensors have another rank.")
    with invalid_config(where):
        return LoraOptions(**options)


def _positions_before_answers(packed: Packed) -> Tensor:
    """Return the positions [K] at which the next token of any row belongs to an answer; at least one."""
    is_learned = (packed.labels[:, 1:] != NOT_LEARNED).any(dim=0)
    is_learned[0] |= ~is_learned.any()  # a batch without answers gives every parameter a gradient of zero
    return is_learned.nonzero()[:, 0]


def _mean_weights(weights: Tensor | None, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the mean over all cells of each encoder's weights [B, E, t, h, w]; empty without weights."""
    if weights is None:
        return {}
    return dict(zip(names, weights.detach().float().mean(dim=(0, 2, 3, 4)), strict=True))
