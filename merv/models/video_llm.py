"""VideoLLM: a causal language model of transformers that sees through a MultiEncoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from merv.checkpoints.folder import fill_exactly, load_folder
from merv.checkpoints.sharing import Shared, brought_llm, find_model
from merv.encoding.base import Encoder
from merv.errors import PromptError, ShapeError, TrainingError
from merv.features.store import FeatureStore
from merv.fusion.fusion import Fusion
from merv.models.chat import NOT_LEARNED, Message, Visual, check_messages, render
from merv.models.llm import LoraOptions, add_lora, check_same, identity, load_llm, shares_rows, stream_tokens
from merv.models.multi_encoder import Encoded, MultiEncoder
from merv.models.packing import Packed, pack, tokens_of
from merv.types import Grid
from merv.utils.suggest import nearest

Conversation = Sequence[Message]


class VideoLLM(Shared, nn.Module):
    """Any causal LM, any encoders: chat messages with videos in, answers out.

    llm, tokenizer: of transformers. vision: a MultiEncoder whose width is the LLM's.
    store: where aligned features are kept, so that encoders run once per video.

    Raises ShapeError where the widths differ.

    >>> from merv.testing import tiny_llm
    >>> llm, tokenizer = tiny_llm()
    >>> vision = MultiEncoder(["fake"], grid=(2, 2, 2), width=llm.config.hidden_size)
    >>> model = VideoLLM(llm, tokenizer, vision).eval()
    >>> video = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    >>> from merv.models.chat import ask
    >>> len(model.generate([ask("What is this?", video)], max_new_tokens=4))
    1
    """

    kind = "VideoLLM"

    def __init__(
        self, llm: Any, tokenizer: Any, vision: MultiEncoder, store: FeatureStore | None = None
    ) -> None:
        super().__init__()
        width = llm.get_input_embeddings().embedding_dim
        if vision.fusion is None or vision.fusion.width != width:
            came = None if vision.fusion is None else vision.fusion.width
            raise ShapeError(
                f"The LLM is {width} wide; build the MultiEncoder with width={width}, not {came}."
            )
        self.llm, self.tokenizer, self.vision, self.store = llm, tokenizer, vision, store
        self.identity = identity(llm)
        self.lora: LoraOptions | None = None
        self.fill: int | None = None  # in training: groups share rows of up to so many tokens
        self.shares: dict[str, Tensor] = {}  # mean weight of each encoder, when last fused
        self.changed: set[str] = set()  # frozen parts that are no longer as their source has them
        self.own_gradients: list[Any] = []
        self.train_only(("projector", "mixer"))

    # The path -----------------------------------------------------------------------------

    def forward(self, groups: Sequence[Sequence[Conversation]]) -> Tensor:
        """The training loss: mean negative log-likelihood of the answers' tokens.

        groups: conversations that end in an answer; those of a group share their video, which
        the LLM then reads once for all of them (if its attention can: `merv.models.llm.shares_rows`).
        """
        total, tokens = self.loss_sum(groups)
        return total / max(tokens, 1)

    def loss_sum(self, groups: Sequence[Sequence[Conversation]]) -> tuple[Tensor, int]:
        """The loss summed over the answers' tokens, and how many they are: what adds up over batches.

        Whatever is in the groups, or nothing, every parameter that is trained gets a gradient.
        """
        if not groups:
            return self.nothing(), 0
        logits, labels, _ = self.predict(groups)
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total, int((labels != NOT_LEARNED).sum())

    def nothing(self) -> Tensor:
        """0, made by running all that is trained: a process without data still takes part in a step."""
        visual = self.fusion.nothing()
        words = self.llm.get_input_embeddings()(torch.tensor([[self.pad_id]], device=self.device))
        embeddings = torch.cat([words, visual[None, :1].to(words)], dim=1)
        return 0.0 * self.llm(inputs_embeds=embeddings, use_cache=False).logits.float().sum()

    def predict(self, groups: Sequence[Sequence[Conversation]]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, K, vocabulary], in fp32, where any row has an answer's token; those tokens
        [B, K] (NOT_LEARNED where this row has none); and whose they are: 1 … n of the row."""
        packed, visual = self.pack(groups)
        if not all(any(turn["role"] == "assistant" for turn in talk) for group in groups for talk in group):
            raise PromptError("There is nothing to predict where a conversation has no assistant's turn.")
        keep = (packed.labels[:, 1:] != NOT_LEARNED).any(dim=0).nonzero()[:, 0]
        return (
            self.logits(packed, visual, keep).float(),
            packed.labels[:, keep + 1],
            packed.branches[:, keep + 1],
        )

    def logits(self, packed: Packed, visual: Tensor, keep: Tensor) -> Tensor:
        """What follows the tokens `keep` [K] of each row: [B, K, vocabulary]."""
        embeddings = packed.embed(self.llm.get_input_embeddings(), visual)
        eager = self.llm.config.get_text_config()._attn_implementation == "eager"
        shared = {"position_ids": packed.positions} if packed.mask.ndim == 4 else {}  # else 0, 1, 2, …
        out = self.llm(
            inputs_embeds=embeddings,
            attention_mask=packed.attention_mask(like=embeddings, additive=eager),
            logits_to_keep=keep,
            use_cache=False,
            **shared,
        )
        return out.logits

    def rows(self, groups: Sequence[Sequence[Conversation]]) -> list[Sequence[Conversation]]:
        """The groups as rows of a batch; each conversation has its own where the LLM cannot share one."""
        return list(groups) if shares_rows(self.llm) else [[talk] for group in groups for talk in group]

    def pack(self, groups: Sequence[Sequence[Conversation]], side: Any = "right") -> tuple[Packed, Tensor]:
        """Conversations as the LLM's input, and the visual tokens [V, L] that go into it."""
        prompts = [[render(messages, self.tokenizer) for messages in row] for row in self.rows(groups)]
        everything = [visual for group in prompts for prompt in group for visual in prompt.visuals]
        visual, runs = self.see(everything)
        ready = iter(runs)
        sequences = [[tokens_of(prompt, ready) for prompt in group] for group in prompts]
        packed = pack(sequences, self.pad_id, side, self.fill if self.training else None)
        device = self.device
        return Packed(*(tensor.to(device) for tensor in vars(packed).values())), visual

    def see(self, visuals: Sequence[Visual]) -> tuple[Tensor, list[range]]:
        """Visual tokens of all videos [V, L], each distinct video once, and which are whose."""
        if not visuals:
            return self.fusion.nothing()[:0].to(self.device), []  # for gradients, and for other processes
        keys = [(_name(v.source), v.question if self.fusion.mixer.conditioned else "") for v in visuals]
        distinct = dict(zip(keys, visuals, strict=True))
        fused = self._encode(list(distinct.values())).fused
        ends = fused.mask.sum(dim=1).cumsum(0).tolist()
        runs = {key: range(start, end) for key, start, end in zip(distinct, [0, *ends], ends, strict=False)}
        return fused.tokens[fused.mask], [runs[key] for key in keys]

    def encode(self, conversation: Conversation) -> Encoded:
        """Features, tokens and weights of the videos of one conversation: a batch of them, in order."""
        visuals = render(conversation, self.tokenizer).visuals
        if not visuals:
            raise PromptError("There is no video or image in this conversation.")
        return self._encode(visuals)

    def _encode(self, visuals: Sequence[Visual]) -> Encoded:
        sources = {_name(visual.source): visual.source for visual in visuals}
        features = self.vision.features(list(sources.values()), store=self.store)
        row = {name: i for i, name in enumerate(sources)}
        rows = [row[_name(visual.source)] for visual in visuals]
        of_visual = {n: Grid.cat([grid[i : i + 1] for i in rows]) for n, grid in features.items()}
        question = self.read([v.question for v in visuals]) if self.fusion.mixer.conditioned else None
        encoded = self.vision.fuse(of_visual, question)
        self.shares = _shares(encoded.fused.weights, self.fusion.names)
        return encoded

    def read(self, questions: Sequence[str]) -> Tensor:
        """The mean embedding of each question's tokens, [B, L]: what a mixer may be conditioned on."""
        table = self.llm.get_input_embeddings()
        ids = [self.tokenizer(q or " ", add_special_tokens=False).input_ids for q in questions]
        return torch.stack([table(torch.tensor(own, device=self.device)).mean(dim=0) for own in ids])

    # Answers ------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, conversations: Sequence[Conversation], **options: Any) -> list[str]:
        """The assistant's next turn in each conversation; options go to transformers' generate.

        Greedy and at most 64 new tokens unless the options say otherwise. A batch gives the same
        answers as one by one.
        """
        inputs = self._inputs(conversations)
        ids = self.llm.generate(**inputs, **self._options(options))
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def stream(self, conversation: Conversation, **options: Any) -> Iterator[str]:
        """The answer to one conversation piece by piece, as it comes."""
        inputs = self._inputs([conversation])
        return stream_tokens(self.llm, self.tokenizer, {**inputs, **self._options(options)})

    @torch.no_grad()
    def log_probs(self, conversations: Sequence[Conversation]) -> list[Tensor]:
        """Log-probability of each token of the assistant's turns, a float tensor a conversation."""
        logits, labels, _ = self.predict([[conversation] for conversation in conversations])
        chosen = logits.log_softmax(dim=-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        return [row[own != NOT_LEARNED] for row, own in zip(chosen, labels, strict=True)]

    def would_say(self, groups: Sequence[Sequence[Conversation]]) -> list[list[bool]]:
        """For each conversation whether greedy decoding would give exactly its answer and stop.

        One pass, without generating: the first token that differs already decides.
        """
        return self.judge(groups)[0]

    @torch.no_grad()
    def judge(self, groups: Sequence[Sequence[Conversation]]) -> tuple[list[list[bool]], Tensor, int]:
        """What `would_say` and `loss_sum` give, in one pass."""
        logits, labels, branches = self.predict(groups)
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        wrong = (logits.argmax(dim=-1) != labels) & (labels != NOT_LEARNED)
        said = iter(
            [
                not wrong[i, branches[i] == number].any()
                for i, row in enumerate(self.rows(groups))
                for number in range(1, len(row) + 1)
            ]
        )
        hits = [[next(said) for _ in group] for group in groups]
        return hits, total, int((labels != NOT_LEARNED).sum())

    def _inputs(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        for messages in conversations:
            check_messages(messages)
            if messages[-1]["role"] == "assistant":
                raise PromptError("To be answered, a conversation must end in the user's turn.")
        with torch.no_grad():
            packed, visual = self.pack([[messages] for messages in conversations], side="left")
            embeddings = packed.embed(self.llm.get_input_embeddings(), visual)
        return {"inputs_embeds": embeddings, "attention_mask": packed.mask.long()}

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        # Without the penalty and length limit that some models bring along: greedy is the likeliest token.
        greedy = {"max_new_tokens": 64, "max_length": None, "do_sample": False, "repetition_penalty": 1.0}
        return {**greedy, "pad_token_id": self.pad_id, **options}

    @property
    def pad_id(self) -> int:
        """What fills up short rows: masked, so that any token will do."""
        own = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if own is None else own

    @property
    def fusion(self) -> Fusion:
        """The MultiEncoder's projectors and mixer."""
        assert self.vision.fusion is not None
        return self.vision.fusion

    @property
    def device(self) -> torch.device:
        """Where the LLM is."""
        return self.llm.get_input_embeddings().weight.device

    # What is trained ----------------------------------------------------------------------

    def add_lora(self, options: LoraOptions) -> None:
        """Put a LoRA on the LLM; it is trained when `lora` is among the parts."""
        add_lora(self.llm, options)
        self.lora = options
        self.train_only(self.trained)

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """Parameters by part: projector, mixer, lora (if there is one), llm, and each encoder by its name.

        `projector.NAME` and `mixer.NAME` are those of one encoder alone.
        """
        fusion = {f"vision.fusion.{name}": p for name, p in self.fusion.named_parameters()}
        llm = {f"llm.{name}": p for name, p in self.llm.named_parameters()}
        parts = {
            "projector": {name: p for name, p in fusion.items() if ".projectors." in name},
            "mixer": {name: p for name, p in fusion.items() if ".mixer." in name},
            "lora": {name: p for name, p in llm.items() if "lora_" in name},
            "llm": {name: p for name, p in llm.items() if "lora_" not in name},
        }
        shared = [f"vision.fusion.mixer.{name}" for name in self.fusion.mixer.of_encoders or ()]
        for name, encoder in self.vision.named():
            before = f"vision.encoders.{name}."
            parts[name] = {before + own: p for own, p in encoder.named_parameters()}
            before = f"vision.fusion.projectors.{name}."
            parts[f"projector.{name}"] = {n: p for n, p in fusion.items() if n.startswith(before)}
            parts[f"mixer.{name}"] = {name: fusion[name] for name in shared}
        return {name: own for name, own in parts.items() if own or name in ("projector", "mixer")}

    def train_only(self, trained: Sequence[str]) -> None:
        """Make exactly these of the parts trainable.

        Raises TrainingError for a part that is not there.
        """
        parts = self.parts()
        for name in trained:
            if name not in parts:
                raise TrainingError(
                    f"Nothing here is called {name!r}.{nearest(name, parts)} There are: {', '.join(parts)}."
                )
            if "." in name and name.partition(".")[0] in trained:
                raise TrainingError(f"{name} is a part of {name.partition('.')[0]}, which is trained whole.")
        self.trained = tuple(trained)
        self.changed |= {name for name in trained if name == "llm" or name in self.vision.encoders}
        self.vision.changed |= self.changed - {"llm"}
        for hook in self.own_gradients:
            hook.remove()
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for name in trained:
            for parameter in parts[name].values():
                parameter.requires_grad_(True)
        self.own_gradients = [] if "mixer" in trained else self._keep_others(trained)

    def _keep_others(self, trained: Sequence[str]) -> list[Any]:
        """Where parts of the mixer are trained: hooks that leave the rest of their parameters as it is."""
        own: dict[str, Tensor] = {}
        for number, name in enumerate(self.vision.encoders):
            if f"mixer.{name}" in trained:
                for parameter, mask in self.fusion.mixer.own(number).items():
                    own[parameter] = mask | own.get(parameter, mask)
        of_mixer = self.fusion.mixer.get_parameter
        return [of_mixer(name).register_hook(partial(torch.mul, mask)) for name, mask in own.items()]

    def join(self, name: str, encoder: Encoder) -> None:
        """Take in another encoder: a fresh projector, and a share in the mixer that is small at first.

        Train it by `train_only([f"projector.{name}", f"mixer.{name}"])`.
        """
        self.vision.join(name, encoder)
        self.train_only(self.trained)

    # Saving -------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """All that `from_pretrained` needs besides tensors, as JSON.

        Raises CheckpointError where an encoder has random weights: nothing could load them again.
        """
        return {
            "llm": {**self.identity, "dtype": str(self.llm.dtype).removeprefix("torch.")},
            "lora": None if self.lora is None else {**vars(self.lora), "targets": list(self.lora.targets)},
            "trained": list(self.trained),
            "changed": sorted(self.altered()),
            "vision": self.vision.config(),
        }

    def altered(self) -> set[str]:
        """Frozen parts, `llm` or encoders, that are no longer as their source has them."""
        return self.changed | self.vision.altered()

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds: all of the fusion, the LoRA, and whatever else was ever trained."""
        parts = self.parts()
        fusion = {f"vision.fusion.{name}": t for name, t in self.fusion.state_dict().items()}
        brought = {"lora"} | self.altered()
        others = [p for name, p in parts.items() if name in brought]
        return {**fusion, **{name: p for own in others for name, p in own.items()}}

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        llm: str | Path | None = None,
        weights: Mapping[str, str | None] | None = None,
        dtype: str | None = None,
        quantise: str | None = None,
    ) -> VideoLLM:
        """Load what `save_pretrained` or `push_to_hub` wrote: a folder, or "owner/name@revision".

        llm: where the language model is now, if not where it was. weights: the same for encoders,
        by name. dtype: of the LLM; None: as it was. quantise: its weights, see `load_llm`.
        Raises CheckpointError where something is not what it was, naming both.
        """
        folder = find_model(folder)
        config, state = load_folder(folder, cls.kind)
        was = config["llm"]
        names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
        source = llm or brought_llm(folder, was["source"]) or was["source"]
        loaded, tokenizer = load_llm(source, dtype or names.get(was["dtype"], "auto"), quantise)
        model = cls(loaded, tokenizer, MultiEncoder.from_config(config["vision"], weights or {}))
        check_same(was, model.identity, folder)
        if config["lora"] is not None:
            model.add_lora(LoraOptions(**config["lora"]))
        model.changed.update(config["changed"])
        model.train_only(config["trained"])
        fill_exactly(model.kept(), state, folder)
        return model.eval()


def _shares(weights: Tensor | None, names: Sequence[str]) -> dict[str, Tensor]:
    """Mean weight [B, E, t, h, w] of each encoder over all cells, 0-dim; nothing where a mixer has none."""
    if weights is None:
        return {}
    return dict(zip(names, weights.detach().float().mean(dim=(0, 2, 3, 4)), strict=True))


def _name(source: Any) -> Any:
    """Equal for equal paths and for one and the same object."""
    return str(source) if isinstance(source, (str, Path)) else id(source)
