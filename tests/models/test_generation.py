"""``generate()`` with the recurrent state carried along equals what is generated with everything computed again."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from torch.nn.utils.rnn import pack_sequence
from transformers.generation.streamers import BaseStreamer

from hf_packfix.models import RecurrentCache, RecurrentForCausalLM, RecurrentModelOutput
from hf_packfix.models.upstream import CACHE_NAME, CACHE_NAMES
from tests.support.layouts import CELLS, LAYOUTS, arrange, new_model, run, tokens

PAD, EOS, V = 0, 10, 17
PADDED = LAYOUTS[1:]


def build(cell="gru", layers=2, sharpness=8.0):
    fields = {"vocab_size": V, "hidden_size": 12, "embedding_size": 12, "pad_token_id": PAD, "eos_token_id": EOS}
    model = new_model(RecurrentForCausalLM, cell, layers, **fields).eval()
    # Far from uniform and from a fixed point, so that paths differ from prompt to prompt and in length.
    with torch.no_grad():
        model.lm_head.weight *= sharpness
        for weight in model.recurrent.rnn.parameters():
            weight *= 4
    return model


def prompts(lengths=(4, 9, 1, 6, 2)):
    return tokens(lengths, low=2, high=V)


@torch.no_grad()
def next_scores(model, ids):
    """Return the log-probabilities ``[V]`` of the next token, reading all ids step by step."""
    steps, _ = run(model.recurrent.rnn, model.recurrent.embeddings.weight[ids])
    return (steps[-1] @ model.lm_head.weight.T).log_softmax(-1)


def greedy(model, ids, count):
    """Return the ``count`` tokens that follow, or those up to the end, by a loop that recomputes everything."""
    new = []
    while len(new) < count and EOS not in new:
        new.append(int(next_scores(model, torch.cat([ids, torch.tensor(new, dtype=ids.dtype)])).argmax()))
    return new


def new_tokens(output, width):
    """Return what was generated behind prompts of this width, up to and with the end."""
    rows = [row[width:].tolist() for row in output]
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


@pytest.mark.parametrize("cell", CELLS)
def test_sampling_draws_from_the_probabilities_of_the_loop(cell):
    model, ids = build(cell, sharpness=2.0), prompts()
    inputs, mask = arrange("left", ids, fill=PAD)
    torch.manual_seed(5)
    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 0, "num_return_sequences": 3}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    output = model.generate(input_ids=inputs, attention_mask=mask, **options)
    assert len(output.sequences) == 15
    drawn = new_tokens(output.sequences, inputs.shape[1])
    assert len({tuple(row) for row in drawn}) > 5
    for place, new in enumerate(drawn):
        row = ids[place // 3]
        for step, token in enumerate(new):
            found = output.logits[step][place].log_softmax(-1)
            expected = next_scores(model, torch.cat([row, torch.tensor(new[:step], dtype=row.dtype)]))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert expected[token] > -20


def prompts_kept(output, inputs):
    """Return whether rows begin with the prompts as given, each as often as it was continued."""
    return torch.equal(output[:, : inputs.shape[1]], inputs.repeat_interleave(len(output) // len(inputs), dim=0))


WAYS = {
    "greedily": {"max_new_tokens": 12},
    "in beams": {"max_new_tokens": 6, "num_beams": 3, "early_stopping": "never", "num_return_sequences": 2},
    "without repeats": {"max_new_tokens": 12, "no_repeat_ngram_size": 2},
}


def alone(model, ids, **options):
    """Return what upstream generates for each prompt by itself, from all its tokens at every step."""
    found = []
    for row in ids:
        found += new_tokens(model.generate(row[None], use_cache=False, do_sample=False, **options), len(row))
    return found


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("way", "layers", "masked"),
    [("greedily", 1, True), ("greedily", 2, False), *((way, 2, True) for way in WAYS)],
)
@pytest.mark.parametrize("layout", PADDED)
@pytest.mark.parametrize("use_cache", [True, False])
def test_searching_equals_each_prompt_alone_wherever_the_padding_stands(cell, layers, layout, use_cache, masked, way):
    model, options = build(cell, layers, sharpness=3.0 if way == "in beams" else 8.0), WAYS[way]
    ids = [*prompts(), torch.tensor([3, 4, 5, 3]), torch.tensor([6, 7, 6, 7, 8, 6]), torch.tensor([9, 9])]
    inputs, mask = arrange(layout, ids, fill=PAD)
    # Without a mask, the token of padding tells where it is.
    given = {"attention_mask": mask} if masked else {}
    before = inputs.clone()
    output = model.generate(inputs, do_sample=False, use_cache=use_cache, **options, **given)
    expected = alone(model, ids, **options)
    assert new_tokens(output, inputs.shape[1]) == expected
    assert layers == 1 or len({len(row) for row in expected}) > 1  # some end before others
    assert way == "greedily" or expected != alone(model, ids, max_new_tokens=options["max_new_tokens"])
    assert prompts_kept(output, before)
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("layout", PADDED)
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_is_drawn_depends_neither_on_the_padding_nor_on_the_cache(layout, use_cache):
    model, ids, drawn = build(sharpness=2.0), prompts(), []
    options = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3}
    for place, caches in (("left", True), (layout, use_cache)):
        inputs, mask = arrange(place, ids, fill=PAD)
        torch.manual_seed(5)
        output = model.generate(inputs, attention_mask=mask, use_cache=caches, **options)
        assert prompts_kept(output, inputs)
        drawn.append(output[:, inputs.shape[1] :])
    assert torch.equal(*drawn)


def test_continuing_from_a_state_with_padded_prompts():
    model, ids = build(sharpness=2.0), prompts((4, 9, 6, 2))
    model.generation_config.eos_token_id = None
    rest = prompts((3, 1, 2, 5))
    (first, seen), (second, unseen) = arrange("holes", ids, fill=PAD), arrange("right", rest, fill=PAD)
    state = model(first, attention_mask=seen, use_cache=True)[CACHE_NAME]
    output = model.generate(
        torch.cat([first, second], dim=1),
        attention_mask=torch.cat([seen, unseen], dim=1),
        max_new_tokens=5,
        do_sample=False,
        **{CACHE_NAME: state},
    )
    whole = [torch.cat(pair) for pair in zip(ids, rest, strict=True)]
    alone = [model.generate(row[None], max_new_tokens=5, do_sample=False)[0, len(row) :] for row in whole]
    assert torch.equal(output[:, -5:], torch.stack(alone))
    assert torch.equal(output[:, :-5], torch.cat([first, second], dim=1))


def test_a_packed_prompt_is_continued():
    model, ids = build(), prompts()
    packed = pack_sequence(ids, enforce_sorted=False)
    for args, kwargs in (((packed,), {}), ((), {"input_ids": packed})):
        output = model.generate(*args, max_new_tokens=12, do_sample=False, **kwargs)
        assert new_tokens(output, max(map(len, ids))) == [greedy(model, row, 12) for row in ids]


def test_every_step_reads_one_token(monkeypatch):
    model, (inputs, mask) = build(), arrange("left", prompts(), fill=PAD)
    seen, forward = [], model.recurrent.forward

    def counting(ids, *args, **kwargs):
        seen.append(ids.shape[1])
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(model.recurrent, "forward", counting)
    model.generate(input_ids=inputs, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert seen == [inputs.shape[1], 1, 1, 1, 1]


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_state_of_the_model_or_of_generate_continues_under_every_name(name):
    model, ids = build(sharpness=2.0), torch.stack(prompts((5, 5)))
    model.generation_config.eos_token_id = None

    def generate(ids, count, **options):
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, **options)

    begun, first = model(ids[:, :4]), generate(ids, 3, return_dict_in_generate=True)
    rest = model(ids[:, 4:], **{name: begun[CACHE_NAME]})
    torch.testing.assert_close(rest.logits, model(ids).logits[:, 4:])
    whole = generate(ids, 6)
    assert torch.equal(generate(ids, 6, **{name: begun[CACHE_NAME]}), whole)
    assert torch.equal(generate(first.sequences, 3, **{name: first.past_key_values}), whole)


def test_two_states_are_refused():
    model, ids = build(), torch.stack(prompts((5, 5)))
    state = model(ids)[CACHE_NAME]
    with pytest.raises(ValueError, match=r"found (cache|past_key_values) and "):
        model(ids, cache=state, past_key_values=state)


def test_no_deprecation_of_upstream_is_met(caplog, recwarn):
    logger = transformers.utils.logging.get_logger("transformers")
    logger.warning_once.__func__.cache_clear()
    model, ids = build(), torch.stack(prompts((5, 5)))
    logger.addHandler(caplog.handler)
    try:
        model(ids, labels=ids).loss.backward()
        model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=2, max_new_tokens=3, do_sample=False)
    finally:
        logger.removeHandler(caplog.handler)
    deprecations = [record.getMessage() for record in caplog.records if "deprecat" in record.getMessage()]
    assert deprecations == []
    assert [str(w.message) for w in recwarn if issubclass(w.category, (DeprecationWarning, FutureWarning))] == []


def test_no_field_has_a_name_that_upstream_reserves():
    ours = {field.name for field in dataclasses.fields(RecurrentModelOutput)}
    assert ours.isdisjoint({*CACHE_NAMES, "cache_params", CACHE_NAME})


def test_a_streamer_gets_every_token():
    class Streamer(BaseStreamer):
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, streamer = build(), Streamer()
    ids = prompts((5,))[0][None]
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), streamer=streamer, max_new_tokens=4, do_sample=False
    )
    assert (streamer.got, streamer.ended) == (found.flatten().tolist(), True)


def test_assisted_generation_is_refused():
    model = build()
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(torch.ones(1, 3).long() * 5, assistant_model=build(), max_new_tokens=3)


def test_few_logits_are_kept_for_generation_alone():
    model = build()
    ids = torch.stack(prompts((5, 5)))
    assert torch.equal(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])
    for kwargs in ({"input_ids": ids, "labels": ids}, {"input_ids": pack_sequence(list(ids))}):
        with pytest.raises(ValueError, match="logits_to_keep serves generation"):
            model(**kwargs, logits_to_keep=1)


def test_the_cache_selects_and_repeats_rows():
    state = torch.arange(12.0).reshape(2, 3, 2)
    cache = RecurrentCache.from_state((state, -state), seen_steps=4)
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.hidden_state, state[:, [0, 0, 1, 1, 2, 2]])
    cache.batch_select_indices(torch.tensor([5, 0]))
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.hidden_state, state[:, [0, 0, 2]])
    assert torch.equal(cache.cell_state, -state[:, [0, 0, 2]])
    assert cache.get_seq_length() == 4
