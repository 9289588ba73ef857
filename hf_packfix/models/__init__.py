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

transformers.AutoConfig.register("recurrent", RecurrentConfig, exist_ok=True)
transformers.AutoModel.register(RecurrentConfig, RecurrentModel, exist_ok=True)
transformers.AutoModelForCausalLM.register(RecurrentConfig, RecurrentForCausalLM, exist_ok=True)
transformers.AutoModelForSequenceClassification.register(
    RecurrentConfig, RecurrentForSequenceClassification, exist_ok=True
)
transformers.AutoModelForTokenClassification.register(RecurrentConfig, RecurrentForTokenClassification, exist_ok=True)
transformers.AutoConfig.register("recurrent-encoder-decoder", RecurrentEncoderDecoderConfig, exist_ok=True)
transformers.AutoModelForSeq2SeqLM.register(RecurrentEncoderDecoderConfig, RecurrentEncoderDecoder, exist_ok=True)
for _config in (RecurrentConfig, RecurrentEncoderDecoderConfig):
    # Without it, `pipeline(model=directory)` of transformers 4.46 loads no tokenizer.
    transformers.AutoTokenizer.register(
        _config, fast_tokenizer_class=transformers.PreTrainedTokenizerFast, exist_ok=True
    )
