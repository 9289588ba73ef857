"""The demo's data: JapaneseVowels (Kudo, Toyama, Shimbo 1999; from the UCR/UEA archive, shipped with sktime).

Nine speakers utter two vowels; 270 training and 370 test series of 7 to 29 steps with 12 cepstrum coefficients.
"""

from __future__ import annotations

from typing import Any

import torch

CHANNELS, SPEAKERS = 12, 9
Row = dict[str, Any]


def load() -> tuple[list[Row], list[Row]]:
    """Return the training and the test rows: ``input_values`` float32 ``[T, 12]``, ``labels`` 0 to 8."""
    # Imported here: it is no requirement of the package, and the demo reports that it is missing.
    from sktime.datasets import load_japanese_vowels

    splits: list[list[Row]] = []
    for split in ("train", "test"):
        series, speakers = load_japanese_vowels(split=split, return_X_y=True, return_type="nested_univ")
        splits.append(
            [
                {
                    # `torch.tensor`, not `as_tensor`, which warns that pandas' arrays cannot be written.
                    "input_values": torch.stack([torch.tensor(c.to_numpy()) for c in row], dim=1).float(),
                    "labels": int(speaker) - 1,
                }
                for row, speaker in zip(series.to_numpy(), speakers, strict=True)
            ]
        )
    every_step = torch.cat([row["input_values"] for row in splits[0]])
    mean, deviation = every_step.mean(0), every_step.std(0)
    for row in splits[0] + splits[1]:
        row["input_values"] = (row["input_values"] - mean) / deviation
    return splits[0], splits[1]
