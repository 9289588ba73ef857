"""Forecasting: the next value of a series, from all values before it.

Each series is a sum of two waves of unknown periods and some noise, 20 to 120 steps long. The target is packed like
the input, one step ahead. The result is compared with the forecast that nothing changes.
"""

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from hf_packfix import DataCollatorForPackedSequence, with_data
from hf_packfix.rnn import GRU  # nn.GRU, faster over packed data


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = GRU(1, 64)
        self.head = nn.Linear(64, 1)

    def forward(self, past, labels):
        states, _ = self.gru(past)
        # From one step to the next a series changes little: forecast the change.
        forecast = past.data + self.head(states.data)  # [N, 1]: N real steps of all series
        loss = nn.functional.mse_loss(forecast, labels.data)  # no mask: there is no padding
        return {"loss": loss, "logits": with_data(states, forecast)}


def row():
    steps = torch.arange(torch.randint(20, 121, ()).item() + 1.0)
    periods, phases = 8 + 24 * torch.rand(2, 1), 6.3 * torch.rand(2, 1)
    series = torch.sin(6.3 * steps / periods + phases).sum(0) + 0.02 * torch.randn(len(steps))
    return {"past": series[:-1, None], "labels": series[1:, None]}


def compute_metrics(prediction):
    forecast, target, past = prediction.predictions, prediction.label_ids, prediction.inputs  # [N, T, 1]
    real = target != -100  # shorter series are padded with -100
    error = abs(forecast - target)[real].mean()
    return {"relative_error": error / abs(past - target)[real].mean()}


torch.set_num_threads(1)  # the steps of small layers are too short to share
set_seed(0)
arguments = TrainingArguments(
    "forecasting_output",
    num_train_epochs=3,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    per_device_train_batch_size=32,
    per_device_eval_batch_size=128,
    include_for_metrics=["inputs"],
    logging_steps=40,
    save_strategy="no",
    report_to=[],
)
model = Forecaster()
model.main_input_name = "past"  # the Trainer hands this key of the batch to compute_metrics
trainer = Trainer(
    model=model,
    args=arguments,
    data_collator=DataCollatorForPackedSequence(),
    train_dataset=[row() for _ in range(2000)],
    eval_dataset=[row() for _ in range(200)],
    compute_metrics=compute_metrics,
)
trainer.train()
print(f"error, of that of the last value: {trainer.evaluate()['eval_relative_error']:.3f}")
