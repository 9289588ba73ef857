"""Recurrent networks as transformers models, for packed and for padded batches.

Importing this package registers them with transformers' auto classes; activation does not import it.
"""

import transformers

from hf_packfix.models.configuration_recurrent import RecurrentConfig
from hf_packfix.models.configuration_recurrent_encoder_decoder import RecurrentEncoderDecoderConfig
from hf_packfix.models.generation import RecurrentCache
from hf_packfix.models.modeling_recurrent import (
    RecurrentForCausalLM,
    RecurrentForSequenceClassification,
    RecurrentForTokenClassification,
    RecurrentModel,
    RecurrentModelOutput,
    RecurrentPreTrainedModel,
)
from hf_packfix.models.modeling_recurrent_encoder_decoder import RecurrentEncoderDecoder

__all__ = [
    "RecurrentCache",
    "RecurrentConfig",
    "RecurrentEncoderDecoder",
    "RecurrentEncoderDecoderConfig",
    "RecurrentForCausalLM",
    "RecurrentForSequenceClassification",
    "RecurrentForTokenClassification",
    "RecurrentModel",
    "RecurrentModelOutput",
    "RecurrentPreTrainedModel",
]

#: The auto class that loads each model.
AUTO_CLASSES = {
    RecurrentModel: transformers.AutoModel,
    RecurrentForCausalLM: transformers.AutoModelForCausalLM,
    RecurrentForSequenceClassification: transformers.AutoModelForSequenceClassification,
    RecurrentForTokenClassification: transformers.AutoModelForTokenClassification,
    RecurrentEncoderDecoder: transformers.AutoModelForSeq2SeqLM,
}
for _config in (RecurrentConfig, RecurrentEncoderDecoderConfig):
    transformers.AutoConfig.register(_config.model_type, _config, exist_ok=True)
    # Without it, `pipeline(model=directory)` of transformers 4.46 loads no tokenizer.
    transformers.AutoTokenizer.register(
        _config, fast_tokenizer_class=transformers.PreTrainedTokenizerFast, exist_ok=True
    )
for _model, _auto in AUTO_CLASSES.items():
    _auto.register(_model.config_class, _model, exist_ok=True)
