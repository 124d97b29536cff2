"""Train with the Trainer of transformers: a thin module around merv's model, and a collator.

    python examples/hf_trainer.py
    python examples/hf_trainer.py --llm FOLDER --encoders dinov2 siglip --data train.jsonl --out model

Needs accelerate, as the Trainer does. Without options it takes tiny random parts and clips of one color,
and ends within a minute in what the saved model says of a clip that it was not trained on. The Trainer
counts the answers' tokens of a whole step, over all passes and processes, before it begins, and hands
their number to the model, which divides its summed loss by it: so each token counts the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from plain_torch import Group, answer, clip, parser, prepared
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from merv import VideoLLM, user_message
from merv.models.chat import render


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, train, save, load, ask."""
    args = parser(__doc__, "outputs/hf_trainer").parse_args(arguments)
    model, groups = prepared(args)
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
    """A VideoLLM as the Trainer wants it: `forward` takes what the collator makes and gives a loss."""

    accepts_loss_kwargs = True  # so that the Trainer counts tokens and hands over their number

    def __init__(self, model: VideoLLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, groups: list[Group], labels: Tensor, num_items_in_batch: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss of these groups, as their part of the whole step's; outside of training their mean."""
        out = self.model(groups)
        return {"loss": out.loss if num_items_in_batch is None else out.loss_sum / num_items_in_batch}

    def train(self, mode: bool = True) -> Learner:
        """A language model that is frozen stays without dropout."""
        super().train(mode)
        if not {"llm", "lora"} & set(self.model.trained):
            self.model.llm.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What was trained: the Trainer's checkpoints need nothing that is frozen."""
        return {
            f"model.{name}": tensor.detach() for name, tensor in self.model.trainable_state_dict().items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what `state_dict` gave; what is frozen stays as it is."""
        return super().load_state_dict({**super().state_dict(), **state_dict})


class Collator:
    """A list of groups to what `Learner.forward` takes; `labels` is there to be counted."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, groups: list[Group]) -> dict[str, Any]:
        prompts = [render(talk, self.tokenizer) for group in groups for talk in group]
        learned = sum(sum(flags) for prompt in prompts for flags in prompt.learned)
        return {"groups": groups, "labels": torch.zeros(learned, dtype=torch.long)}


def train(model: VideoLLM, groups: Sequence[Group], resume: str | None = None, **options: Any) -> None:
    """Train, with these of TrainingArguments. resume: a checkpoint of the Trainer to go on from."""
    arguments = TrainingArguments(
        remove_unused_columns=False,  # a group is no row of columns
        dataloader_pin_memory=False,  # nor is it tensors
        report_to="none",
        **options,
    )
    trainer = Trainer(Learner(model), arguments, Collator(model.tokenizer), train_dataset=groups)
    trainer.train(resume_from_checkpoint=resume)


if __name__ == "__main__":
    main()
