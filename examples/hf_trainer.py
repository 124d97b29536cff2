"""Train with transformers' Trainer, using a thin wrapper around merv's model and a collator.

    python examples/hf_trainer.py
    python examples/hf_trainer.py --llm FOLDER --encoders dinov2 siglip --data train.jsonl --out model

The Trainer needs accelerate, which the extra `demo` has. Without options, the script trains tiny random parts
on clips of one color, takes less than a minute, and prints the saved model's answer about a clip that it was
not trained on.
Before each step the Trainer counts the answer tokens of all micro-batches and processes. The model divides
its summed loss by that number, so every token has the same weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from plain_torch import Group, answer, clip, parser, prepare
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from merv import VideoLLM, user_message
from merv.models.chat_template import ChatTemplate


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, train, save, load, ask."""
    args = parser(__doc__, "outputs/hf_trainer").parse_args(arguments)
    model, groups = prepare(args)
    train(
        model,
        groups,
        output_dir=str(args.out.with_name(f"{args.out.name}-run")),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr,
        logging_steps=10,
    )
    model.cpu().save_pretrained(args.out)
    answer(args.out, groups if args.data else [[user_message("Which color?", clip((200, 50, 45)))]])


class Learner(nn.Module):
    """Wrap a VideoLLM for the Trainer: `forward` takes the collator's output and returns a loss."""

    accepts_loss_kwargs = True  # makes the Trainer count tokens and pass num_items_in_batch

    def __init__(self, model: VideoLLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, groups: list[Group], labels: Tensor, num_items_in_batch: Tensor | None = None
    ) -> dict[str, Tensor]:
        """In training, this batch's share of the step's mean loss; in evaluation, the batch's mean loss."""
        out = self.model(groups)
        return {"loss": out.loss if num_items_in_batch is None else out.loss_sum / num_items_in_batch}

    def train(self, mode: bool = True) -> Learner:
        """Keep a frozen language model in eval mode, without dropout."""
        super().train(mode)
        if not {"llm", "lora"} & set(self.model.trained):
            self.model.llm.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Only the trained parts, so that checkpoints do not contain frozen weights."""
        return {
            f"model.{name}": tensor.detach() for name, tensor in self.model.trainable_state_dict().items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load the trained parts; frozen weights keep their values."""
        return super().load_state_dict({**super().state_dict(), **state_dict})


class Collator:
    """Turn groups into arguments of `Learner.forward`; the Trainer counts the elements of `labels`."""

    def __init__(self, chat: ChatTemplate) -> None:
        self.chat = chat

    def __call__(self, groups: list[Group]) -> dict[str, Any]:
        prompts = [
            prompt
            for group in groups
            for messages in group
            for prompt in self.chat.training_prompts(messages)
        ]
        learned = sum(sum(prompt.learned) for prompt in prompts)
        return {"groups": groups, "labels": torch.zeros(learned, dtype=torch.long)}


def train(model: VideoLLM, groups: Sequence[Group], resume: str | None = None, **options: Any) -> None:
    """Train with these TrainingArguments; resume: a checkpoint of the Trainer to continue from."""
    arguments = TrainingArguments(
        remove_unused_columns=False,  # a group is not a dict of columns
        dataloader_pin_memory=False,  # a group holds no tensors to pin
        report_to="none",
        **options,
    )
    trainer = Trainer(Learner(model), arguments, Collator(model.chat), train_dataset=groups)
    trainer.train(resume_from_checkpoint=resume)


if __name__ == "__main__":
    main()
