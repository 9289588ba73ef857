"""Train Trainer subclasses of trl and sentence_transformers, as their users do, and print what they logged.

    python tests/support/third_party_trainers.py packed|padded PROGRAM ...

``tests/tools/third_parties.py`` runs this in an environment of its own. Nothing here turns hf_packfix on: the variable
``HF_PACKFIX`` does, or does not. The models run a padded batch without packing it, so that the padded run shares no
code with what is tested.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Module
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

VOCABULARY, HIDDEN, PAD = 12, 8, 0
TEXTS = ["3 4", "5 6 7 8 9", "4", "9 8 7", "3 3 4 5", "6 5 4 3 9 8"] * 2
COMMON: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.05,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "seed": 3,
}
#: What measures time, or counts padding: `floating_point_ops` has no mask to tell it from tokens.
INCOMPARABLE = ("runtime", "per_second", "total_flos")


def sequences(rows: Sequence[Sequence[int]], packed: bool) -> Any:
    """Return token ids as a PackedSequence, or as a padded tensor padded on the right."""
    tensors = [torch.tensor(row) for row in rows]
    return pack_sequence(tensors, enforce_sorted=False) if packed else pad_sequence(tensors, True, PAD)


def mask(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the attention mask ``[B, T]`` of padded rows."""
    return pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are numbers, and whose ids are they."""
    words = {"<pad>": PAD, "<unk>": 1, "<end>": 2, **{str(i): i for i in range(3, VOCABULARY)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")


# --- models ---------------------------------------------------------------------------------------------


class Config(PretrainedConfig):
    model_type = "third-party-user"


class Backbone(PreTrainedModel):
    """A GRU that gives padded tensors ``[B, T, HIDDEN]``, whatever it is given."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.post_init()

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> BaseModelOutput:
        if isinstance(input_ids, PackedSequence):
            steps, _ = self.gru(input_ids._replace(data=self.embedding(input_ids.data)))
            return BaseModelOutput(pad_packed_sequence(steps, batch_first=True)[0])
        return BaseModelOutput(self.gru(self.embedding(input_ids))[0])


class CausalLM(PreTrainedModel):
    config_class = Config
    base_model_prefix = "backbone"  # which trl calls without the head

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.backbone(input_ids).last_hidden_state))


class Scorer(Backbone):
    """One number a row, from the state after its last real step."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # No bias: it cancels in the loss, and Adam would scale the rounding noise of its gradient to a whole step.
        self.score = nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, input_ids: Any, attention_mask: Tensor, **kwargs: Any) -> SequenceClassifierOutput:
        states = super().forward(input_ids).last_hidden_state
        last = states[torch.arange(len(states)), attention_mask.sum(1) - 1]
        return SequenceClassifierOutput(logits=self.score(last))


class Sentence(Module):
    """A sentence embedding: the mean of a GRU's states; tokenizes to packed or to padded batches."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed, self.backbone = packed, Backbone(Config())

    def preprocess(self, inputs: list[str], **kwargs: Any) -> dict[str, Any]:
        rows = [numbers(text) for text in inputs]
        return {"input_ids": sequences(rows, self.packed), "attention_mask": mask(rows)}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        real = features["attention_mask"].unsqueeze(-1)
        states = self.backbone(features["input_ids"]).last_hidden_state * real
        return {**features, "sentence_embedding": states.sum(1) / real.sum(1)}

    def save(self, *args: Any, **kwargs: Any) -> None:
        pass


def build(kind: Callable[..., Any], *args: Any) -> Any:
    torch.manual_seed(0)
    return kind(*args)


# --- what is trained ------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def sft(packed: bool, directory: str) -> Any:
    """Packed input ids, and padded tensors where trl's loss slices and sums: labels and the attention mask."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [row["input_ids"] for row in rows]
        labels = sequences(ids, False).masked_fill(mask(ids) == 0, -100)
        return {"input_ids": sequences(ids, packed), "attention_mask": mask(ids), "labels": labels}

    return sft_trainer(build(CausalLM, Config()), directory, collate)


def sft_all_packed(packed: bool, directory: str) -> Any:
    """Everything packed, the states of the model, too."""
    from hf_packfix import DataCollatorForPackedSequence

    return sft_trainer(recurrent(), directory, DataCollatorForPackedSequence() if packed else None)


def sft_trainer(model: Any, directory: str, collator: Any) -> SFTTrainer:
    ids = [[*numbers(text), 2] for text in TEXTS]
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    # Left to itself it checkpoints gradients, which recurrent models do not support.
    args = SFTConfig(directory, **COMMON, activation_checkpointing=False, include_num_input_tokens_seen="non_padding")
    return SFTTrainer(model, args, collator, data, data, processing_class=tokenizer())


def recurrent() -> Any:
    from hf_packfix.models import RecurrentConfig, RecurrentForCausalLM

    return build(RecurrentForCausalLM, RecurrentConfig(cell_type="gru", vocab_size=VOCABULARY, hidden_size=HIDDEN))


def reward(packed: bool, directory: str) -> Any:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        return {"input_ids": sequences(ids, packed), "attention_mask": mask(ids)}

    ids = [numbers(text) for text in TEXTS]
    pairs = zip(ids, [*ids[1:], ids[0]], strict=True)
    data = Dataset.from_list([{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in pairs])
    args = RewardConfig(directory, **COMMON, activation_checkpointing=False)
    model = build(Scorer, Config(num_labels=1))
    return RewardTrainer(model, args, collate, data, data, processing_class=tokenizer())


def dpo(packed: bool, directory: str) -> Any:
    """The collator of trl itself, which builds its own padded tensors: ordinary batches, packed inside the model."""
    rows = [{"prompt": "3 4 ", "chosen": a, "rejected": b} for a, b in zip(TEXTS, [*TEXTS[1:], "7 7"], strict=True)]
    data = Dataset.from_list(rows)
    args = DPOConfig(directory, **COMMON, activation_checkpointing=False)
    return DPOTrainer(
        recurrent(), recurrent(), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer()
    )


def sentences(packed: bool, directory: str) -> Any:
    labels = [i % 3 / 2 for i in range(len(TEXTS))]
    data = Dataset.from_dict({"a": TEXTS, "b": [*TEXTS[1:], TEXTS[0]], "label": labels})
    model = SentenceTransformer(modules=[build(Sentence, packed)], device="cpu")
    args = SentenceTransformerTrainingArguments(directory, **COMMON)
    return SentenceTransformerTrainer(model, args, data, data, loss=CosineSimilarityLoss(model))


PROGRAMS: dict[str, Callable[[bool, str], Any]] = {
    "sft": sft,
    "sft_all_packed": sft_all_packed,
    "reward": reward,
    "dpo": dpo,
    "sentences": sentences,
}


def outcome(program: Callable[[bool, str], Any], packed: bool) -> Any:
    """Return the numbers that training and evaluation logged, in order, or what was raised."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            trainer = program(packed, directory)
            trainer.train()
            trainer.evaluate()
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in INCOMPARABLE)}
        for entry in trainer.state.log_history
    ]


def main() -> None:
    """Run what the command line names; the last line printed is the outcomes."""
    layout, *names = sys.argv[1:]
    outcomes = {name: outcome(PROGRAMS[name], layout == "packed") for name in names}
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
