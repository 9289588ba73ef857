"""A saved model loads in another process: with the plugin on, without an import; without it, its files say how."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers import AutoConfig, pipeline

from hf_packfix.models import (
    RecurrentConfig,
    RecurrentEncoderDecoder,
    RecurrentEncoderDecoderConfig,
    RecurrentForSequenceClassification,
)
from tests.support.interpreters import execute
from tests.support.layouts import run

WORDS = ["[PAD]", "[UNK]", "the", "film", "was", "good", "bad"]
TEXTS = ["the film was good", "bad", "the film was bad and good and bad"]


@pytest.fixture
def saved(tmp_path):
    """A folder with a classifier and its tokenizer, and one beside it with an encoder-decoder."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    config = RecurrentConfig("lstm", vocab_size=len(WORDS), hidden_size=4, pad_token_id=0, num_labels=2)
    RecurrentForSequenceClassification(config).save_pretrained(tmp_path)
    other = RecurrentEncoderDecoderConfig(vocab_size=5, hidden_size=4, pad_token_id=0)
    RecurrentEncoderDecoder(other).save_pretrained(tmp_path / "other")
    return tmp_path


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pipeline_gives_each_text_of_a_batch_the_scores_it_has_alone(saved, side):
    model = RecurrentForSequenceClassification.from_pretrained(saved)
    classify = pipeline("text-classification", model=str(saved), batch_size=3, top_k=None)
    classify.tokenizer.padding_side = side
    for text, found in zip(TEXTS, classify(TEXTS), strict=True):
        ids = torch.tensor([WORDS.index(word) if word in WORDS else 1 for word in text.split()])
        final = run(model.recurrent.rnn, model.recurrent.embeddings.weight[ids])[1][-1]
        expected = dict(enumerate(model.classifier(final).softmax(-1).tolist()))
        scores = {int(entry["label"].removeprefix("LABEL_")): entry["score"] for entry in found}
        assert scores == pytest.approx(expected, abs=1e-5)


LOADS = {
    "pipeline": f"[p['score'] for p in pipeline('text-classification', model=folder)({TEXTS})]",
    "AutoConfig": "type(AutoConfig.from_pretrained(folder)).__name__",
    "AutoTokenizer": "AutoTokenizer.from_pretrained(folder)('the film')['input_ids']",
    "AutoModelForSequenceClassification": "type(AutoModelForSequenceClassification.from_pretrained(folder)).__name__",
    "AutoModelForSeq2SeqLM": "type(AutoModelForSeq2SeqLM.from_pretrained(folder + '/other')).__name__",
}


@pytest.mark.parametrize("name", LOADS)
def test_a_saved_model_loads_in_a_process_with_the_plugin_as_it_does_here(saved, name):
    lines = ["import hf_packfix", f"from transformers import {name}"]
    # Turned on before transformers is imported, or after it.
    lines = [*(lines if name == "pipeline" else lines[::-1]), "import json, sys", f"folder = {str(saved)!r}"]
    lines += ["assert 'hf_packfix.models' not in sys.modules", f"print(json.dumps({LOADS[name]}))"]
    found = json.loads(execute("\n".join(lines)).stdout.splitlines()[-1])
    expected = eval(LOADS[name], {name: getattr(transformers, name), "folder": str(saved)})
    assert found == pytest.approx(expected)
    assert "__name__" not in LOADS[name] or found.startswith("Recurrent")


def test_without_the_plugin_the_saved_files_say_what_to_import(saved):
    load = f"from transformers import AutoConfig; print(AutoConfig.from_pretrained({str(saved)!r}).model_type)"
    done = execute(load, status=1, HF_PACKFIX="0")
    assert "model type `recurrent`" in done.stderr
    for folder in (saved, saved / "other"):
        requires = json.loads((folder / "config.json").read_text(encoding="utf-8"))["requires"]
        assert requires == "import hf_packfix.models (pip install hf-packfix)"
    done = execute(f"{requires.partition(' (')[0]}\n{load}", HF_PACKFIX="0")
    assert done.stdout.splitlines()[-1:] == ["recurrent"], done.stderr


@pytest.mark.parametrize(
    "config", [RecurrentConfig(vocab_size=3), RecurrentEncoderDecoderConfig(vocab_size=3, pad_token_id=0)]
)
def test_a_configuration_has_an_auto_map_that_is_saved_only_if_it_is_used(tmp_path, config):
    # What trl reads of every model type that is not transformers' own.
    assert config.auto_map == {}
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    assert "auto_map" not in json.loads(file.read_text(encoding="utf-8"))
    config.auto_map["AutoModel"] = "modeling_mine.Mine"
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.auto_map == {"AutoModel": "modeling_mine.Mine"}
    assert not hasattr(loaded, "requires")
