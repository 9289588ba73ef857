"""The recurrent state under the names that transformers' releases have for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

#: The keywords under which releases know what generation carries from step to step, newest first. Users may use
#: either, whatever is installed.
CACHE_NAMES = ("cache", "past_key_values")


def cache_name(names: Iterable[str]) -> str:
    """Return which field of a language model's output holds the cache: a known name, or else an unknown field."""
    found = dict.fromkeys(names)
    unknown = [name for name in found if name not in ("loss", "logits", "hidden_states", "attentions")]
    return next((name for name in (*CACHE_NAMES, *unknown) if name in found), CACHE_NAMES[0])


#: The keyword that the installed release uses: ``past_key_values`` up to 5.23, ``cache`` from 5.24 on.
CACHE_NAME = cache_name(field.name for field in fields(CausalLMOutputWithPast))

#: All of these names.
STATE_NAMES = tuple(dict.fromkeys((CACHE_NAME, *CACHE_NAMES)))


def given_state(arguments: Mapping[str, Any]) -> Any:
    """Return the recurrent state among a call's arguments, whatever it is called there; None if there is none.

    Args:
        arguments: keyword arguments of ``forward`` or ``generate``.

    Raises:
        ValueError: there are several.
    """
    given = {name: arguments[name] for name in STATE_NAMES if arguments.get(name) is not None}
    if len(given) > 1:
        raise ValueError(f"expected the recurrent state under one keyword, found {' and '.join(given)}: pass one")
    return [*given.values(), None][0]  # dynamo of torch 2.7 has no `next` with a default
