"""Time-series classification: who of nine speakers says "ae"? 640 recordings of 7 to 29 steps and 12 channels.

A model of your own: a plain `torch.nn.Module` that gets a PackedSequence. The data, JapaneseVowels, comes with
sktime: pip install "hf-packfix[demo]".
"""

import torch
from sktime.datasets import load_japanese_vowels
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from hf_packfix import DataCollatorForPackedSequence, with_data


class SpeakerClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(12)
        self.gru = nn.GRU(12, 64, bidirectional=True)
        self.head = nn.Linear(2 * 64, 9)

    def forward(self, series, labels=None):
        series = with_data(series, self.norm(series.data))  # .data: [N, 12], the real steps of all recordings
        _, last = self.gru(series)  # [2, B, 64], each direction after its own last real step
        logits = self.head(torch.cat([last[0], last[1]], dim=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def rows(split):
    series, speakers = load_japanese_vowels(split=split, return_X_y=True, return_type="nested_univ")
    return [
        {"series": torch.tensor([channel.to_list() for channel in recording]).T, "labels": int(speaker) - 1}
        for recording, speaker in zip(series.to_numpy(), speakers)
    ]


def compute_metrics(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


torch.set_num_threads(1)  # the steps of small layers are too short to share
set_seed(0)
arguments = TrainingArguments(
    "time_series_classification_output",
    num_train_epochs=20,
    learning_rate=5e-3,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=64,
    logging_steps=85,
    save_strategy="no",
    report_to=[],
)
trainer = Trainer(
    model=SpeakerClassifier(),
    args=arguments,
    data_collator=DataCollatorForPackedSequence(),
    train_dataset=rows("train"),
    eval_dataset=rows("test"),
    compute_metrics=compute_metrics,
)
trainer.train()
print(f"accuracy: {trainer.evaluate()['eval_accuracy']:.3f}")  # a guess: 0.11
