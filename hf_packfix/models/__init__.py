"""Recurrent networks as transformers models, for packed and for padded batches.

Importing this package registers them with transformers' auto classes; activation does not import it.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

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

AutoConfig.register("recurrent", RecurrentConfig, exist_ok=True)
AutoModel.register(RecurrentConfig, RecurrentModel, exist_ok=True)
AutoModelForCausalLM.register(RecurrentConfig, RecurrentForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(RecurrentConfig, RecurrentForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(RecurrentConfig, RecurrentForTokenClassification, exist_ok=True)
AutoConfig.register("recurrent-encoder-decoder", RecurrentEncoderDecoderConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(RecurrentEncoderDecoderConfig, RecurrentEncoderDecoder, exist_ok=True)
for _config in (RecurrentConfig, RecurrentEncoderDecoderConfig):
    # Without it, `pipeline(model=directory)` of transformers 4.46 loads no tokenizer.
    AutoTokenizer.register(_config, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
