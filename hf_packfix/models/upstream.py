"""Every upstream name that the recurrent models rely on.

The other modules of this folder import transformers through this one. :data:`CONTRACT` lists each name with the
releases that have it: ``tests/drift.py`` checks the list on every minor release, ``hf-packfix doctor`` checks it on
the installed one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import transformers
from packaging.version import InvalidVersion, Version
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import ModelOutput

__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "CONTRACT",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "CausalLMOutputWithPast",
    "GenerationMixin",
    "ModelOutput",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
    "PretrainedConfig",
    "Seq2SeqLMOutput",
    "SequenceClassifierOutput",
    "TokenClassifierOutput",
    "UpstreamName",
    "deviations",
    "given_state",
    "premature",
    "rename_state",
]


@dataclass(frozen=True)
class UpstreamName:
    """A name of transformers that the models rely on.

    Attributes:
        place: ``module:path`` of an object that is imported, called or overridden; or ``module`` alone for a word
            in its source, such as the name of an attribute or keyword that the module reads.
        word: the word, if ``place`` is a module.
        use: what the models do with it.
        since: the first release that has it.
        until: the first release that does not have it any more; None while it is there.
    """

    place: str
    word: str
    use: str
    since: str = "4.46"
    until: str | None = None

    def __str__(self) -> str:
        return f"{self.word!r} in {self.place}" if self.word else self.place

    def expected_in(self, version: Version) -> bool:
        """Return whether a release should have it."""
        return version >= Version(self.since) and (self.until is None or version < Version(self.until))

    def found(self) -> bool:
        """Return whether the installed release has it; imports the module."""
        name, _, path = self.place.partition(":")
        try:
            value: Any = import_module(name)
            for attribute in path.split(".") if path else ():
                value = getattr(value, attribute)
        except (ImportError, AttributeError):
            return False
        return not self.word or re.search(rf"\b{re.escape(self.word)}\b", inspect.getsource(value)) is not None


def _objects(use: str, *places: str) -> tuple[UpstreamName, ...]:
    return tuple(UpstreamName(place, "", use) for place in places)


def _words(module: str, use: str, *words: str) -> tuple[UpstreamName, ...]:
    return tuple(UpstreamName(module, word, use) for word in words)


_GENERATION = "transformers.generation.utils"
_OUTPUT = "transformers.modeling_outputs:CausalLMOutputWithPast"

#: Every upstream name that the models rely on.
CONTRACT: tuple[UpstreamName, ...] = (
    *_objects("base class", "transformers:PreTrainedModel", "transformers:PretrainedConfig"),
    *_objects("base class", "transformers:GenerationMixin", "transformers.utils.generic:ModelOutput"),
    *_objects(
        "returned by forward",
        "transformers.modeling_outputs:CausalLMOutputWithPast",
        "transformers.modeling_outputs:Seq2SeqLMOutput",
        "transformers.modeling_outputs:SequenceClassifierOutput",
        "transformers.modeling_outputs:TokenClassifierOutput",
    ),
    *_objects(
        "registration",
        "transformers:AutoConfig.register",
        "transformers:AutoModel.register",
        "transformers:AutoModelForCausalLM.register",
        "transformers:AutoModelForSeq2SeqLM.register",
        "transformers:AutoModelForSequenceClassification.register",
        "transformers:AutoModelForTokenClassification.register",
    ),
    *_objects("called", "transformers:PreTrainedModel.post_init", "transformers.utils.generic:ModelOutput.to_tuple"),
    *_objects(
        "overridden",
        "transformers:PreTrainedModel._init_weights",
        "transformers:PreTrainedModel.get_input_embeddings",
        "transformers:PreTrainedModel.set_input_embeddings",
        "transformers:PreTrainedModel.get_output_embeddings",
        "transformers:PreTrainedModel.resize_token_embeddings",
        "transformers:PretrainedConfig.to_diff_dict",
        "transformers:PretrainedConfig.get_text_config",
        "transformers:GenerationMixin.generate",
        "transformers:GenerationMixin._supports_default_dynamic_cache",
    ),
    *_words(
        "transformers.modeling_utils",
        "class attribute that the base class reads",
        "config_class",
        "base_model_prefix",
        "main_input_name",
        "supports_gradient_checkpointing",
        "_tied_weights_keys",
    ),
    *_words(
        "transformers.configuration_utils",
        "class attribute that the base class reads",
        "model_type",
        "use_return_dict",
    ),
    *_words(_GENERATION, "class attribute that generate() reads", "_is_stateful"),
    *_words(_GENERATION, "method of the cache that generate() calls", "get_seq_length", "reorder_cache"),
    *_words(_GENERATION, "output or argument of the encoder-decoder", "encoder_outputs", "decoder_attention_mask"),
    *_words("transformers.trainer", "what the Trainer reads or passes", "keys_to_ignore_at_inference", "label_names"),
    *_words("transformers.trainer", "keyword that the Trainer passes to forward", "num_items_in_batch"),
    *_words(
        "transformers.data.data_collator",
        "method of the encoder-decoder that DataCollatorForSeq2Seq calls",
        "prepare_decoder_input_ids_from_labels",
    ),
    UpstreamName(f"{_OUTPUT}.past_key_values", "", "field of the state; from 5.24 on another name of `cache`"),
    UpstreamName(f"{_OUTPUT}.cache", "", "field of the state", since="5.24"),
    UpstreamName(_GENERATION, "logits_to_keep", "keyword that generate() passes to forward", since="4.49"),
    UpstreamName(_GENERATION, "is_compileable", "attribute of the cache that generate() reads", since="4.49"),
    UpstreamName(_GENERATION, "is_croppable", "attribute of the cache that generate() reads", since="5.17"),
    UpstreamName(_GENERATION, "is_linear", "attribute of the cache that generate() reads", since="5.24"),
    UpstreamName(_GENERATION, "batch_select_indices", "method of the cache that generate() calls", until="4.56"),
    UpstreamName(_GENERATION, "batch_repeat_interleave", "method of the cache that generate() calls", until="4.56"),
    UpstreamName(
        "transformers.configuration_utils",
        "is_composition",
        "class attribute: a configuration cannot be built from defaults",
        until="4.52",
    ),
    UpstreamName(
        "transformers.configuration_utils",
        "has_no_defaults_at_init",
        "class attribute: a configuration cannot be built from defaults",
        since="4.52",
        until="5.20",
    ),
)


def deviations() -> list[str]:
    """Return what the installed transformers lacks of the contract, one line a name; empty if nothing."""
    version = _installed()
    return [
        f"transformers {version} has no {name}, on which hf_packfix.models rely ({name.use})"
        for name in CONTRACT
        if version is not None and name.expected_in(version) and not name.found()
    ]


def premature() -> list[str]:
    """Return the names that are there outside the releases that the contract lists for them, one line a name."""
    version = _installed()
    return [
        f"transformers {version} has {name}, expected since {name.since} and until {name.until or 'further notice'}"
        for name in CONTRACT
        if version is not None and not name.expected_in(version) and name.found()
    ]


def _installed() -> Version | None:
    try:
        return Version(transformers.__version__)
    except InvalidVersion:
        return None


# --- the recurrent state ----------------------------------------------------------------------------------

#: The keywords under which releases know what generation carries from step to step, newest first. Users may use
#: either, whatever is installed.
CACHE_NAMES = ("cache", "past_key_values")


def _cache_name() -> str:
    # Asked of the class, not of a version number: it is the one field that is not a tensor or a tuple of tensors.
    others = {"loss", "logits", "hidden_states", "attentions"}
    names = [field.name for field in fields(CausalLMOutputWithPast) if field.name not in others]
    if len(names) != 1:
        raise ImportError(
            f"hf_packfix.models expects one field of transformers' CausalLMOutputWithPast to hold the cache, found "
            f"{names}; this release is newer than hf_packfix {_hf_packfix_version()}: upgrade hf_packfix"
        )
    return names[0]


def _hf_packfix_version() -> str:
    from hf_packfix._version import __version__

    return __version__


#: The keyword that the installed release uses: ``past_key_values`` up to 5.23, ``cache`` from 5.24 on.
CACHE_NAME = _cache_name()


def given_state(arguments: Mapping[str, Any]) -> Any:
    """Return the recurrent state among a call's arguments, whatever it is called there; None if there is none.

    Args:
        arguments: keyword arguments of ``forward`` or ``generate``.

    Raises:
        ValueError: there are several.
    """
    given = {name: arguments[name] for name in _state_names() if arguments.get(name) is not None}
    if len(given) > 1:
        raise ValueError(f"expected the recurrent state under one keyword, found {' and '.join(given)}: pass one")
    return next(iter(given.values()), None)


def rename_state(arguments: dict[str, Any]) -> None:
    """Put the recurrent state under the keyword of the installed release, in place.

    Raises:
        ValueError: there are several.
    """
    state = given_state(arguments)
    for name in _state_names():
        arguments.pop(name, None)
    if state is not None:
        arguments[CACHE_NAME] = state


def _state_names() -> tuple[str, ...]:
    return tuple(dict.fromkeys((CACHE_NAME, *CACHE_NAMES)))
