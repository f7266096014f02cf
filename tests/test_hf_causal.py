"""What `AutoModelForCausalLM` returns and draws has the meaning that transformers gives to it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import LENGTH, SETTINGS, make_model, with_counts
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, set_seed
from transformers.generation import logits_process

from dflow import hf, zoo
from dflow.config import InputError
from dflow.ops.noise import Controls, Noise

K = 5
CAUSAL = [family for family in zoo.names("text") if zoo.find(family).known == "before"]
OTHERS = [family for family in zoo.names("text") if family not in CAUSAL]


def causal(family: str, length: int = LENGTH, **more: Any) -> hf.DflowForCausalLM:
    torch.manual_seed(0)
    settings = SETTINGS[family] | {"length": length} | more
    model = hf.DflowForCausalLM(hf.DflowConfig(family=family, vocab_size=K, **settings))
    with_counts(model, K)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return model.eval()


def symbols(n: int = 6, length: int = LENGTH) -> Tensor:
    return torch.randint(0, K, (n, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("family", CAUSAL)
def test_logits_are_those_of_the_next_symbol(family: str) -> None:
    model = causal(family)
    for n in (1, 3, LENGTH):
        x = symbols(length=n)
        logits = model(x).logits
        assert logits.shape == (6, n, K)
        assert bool(logits.isfinite().all())
        terms = model.log_prob_each(x)
        shifted = logits[:, :-1].log_softmax(-1).gather(-1, x[:, 1:, None]).squeeze(-1)
        torch.testing.assert_close(shifted, terms[:, 1:])
        # Later symbols change nothing before them.
        other = x.clone()
        other[:, -1] = (other[:, -1] + 1) % K
        torch.testing.assert_close(model(other).logits[:, :-1], logits[:, :-1])
    assert torch.equal(model(x, logits_to_keep=2).logits, logits[:, -2:])


@torch.no_grad()
@pytest.mark.parametrize("family", CAUSAL)
def test_the_loss_is_that_of_transformers(family: str) -> None:
    model, x = causal(family), symbols()
    assert model(x).loss is None
    labels = x.clone()
    labels[0, :4] = labels[2, 3] = -100
    output = model(x, labels=labels)
    expected = F.cross_entropy(
        output.logits[:, :-1].reshape(-1, K), labels[:, 1:].reshape(-1), ignore_index=-100
    )
    torch.testing.assert_close(output.loss, expected)
    number = int((labels[:, 1:] != -100).sum())
    share = model(x, labels=labels, num_items_in_batch=torch.tensor(2 * number)).loss
    torch.testing.assert_close(share, expected / 2)
    assert model(x, labels=labels, return_dict=False)[0] == output.loss
    with pytest.raises(InputError, match=r"label 5 is no symbol of 0\.\.4; give -100"):
        model(x, labels=torch.full_like(x, K))
    with pytest.raises(InputError, match="labels have shape"):
        model(x, labels=x[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CAUSAL)
def test_padding_changes_nothing(family: str, side: str) -> None:
    model, x = causal(family), symbols()
    lengths = [8, 5, 1, 7, 3, 2]
    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    padded = x.masked_fill(~mask, K)
    output = model(padded, attention_mask=mask.long(), labels=padded.masked_fill(~mask, -100))
    terms = []
    for row in range(len(lengths)):
        alone = x[row][mask[row]][None]
        torch.testing.assert_close(output.logits[row][mask[row]], model(alone).logits[0])
        terms.append(model.log_prob_each(alone)[0, int(side == "right") :])
    # With padding before it, the first symbol is predicted too, from nothing.
    if side == "left":
        terms[0] = terms[0][1:]
    torch.testing.assert_close(output.loss, -torch.cat(terms).mean())


@torch.no_grad()
def test_models_with_a_context_read_as_far() -> None:
    model, x = causal("transformer", context=6), symbols(length=LENGTH + 6)
    logits = model(x).logits
    given = model.log_prob_each(x[:1, 6:], given=x[0, :6])
    shifted = logits[:1, :-1].log_softmax(-1).gather(-1, x[:1, 1:, None]).squeeze(-1)
    torch.testing.assert_close(shifted[:, 5:].double(), given.double(), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="sequence of 15 symbols; this model gives logits of at most 14"):
        model(symbols(length=15))


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_have_an_exact_loss_and_no_logits(family: str) -> None:
    model, x = causal(family), symbols()
    output = model(x, labels=x)
    assert output.logits is None
    torch.testing.assert_close(output.loss, -model.log_prob(x).mean() / LENGTH)
    assert torch.equal(output.log_prob, model.log_prob(x))
    assert model(x).loss is None
    with pytest.raises(InputError, match="labels are input_ids"):
        model(x, labels=(x + 1) % K)


@torch.no_grad()
@pytest.mark.parametrize("family", ["grouped", "multiscale", "transformer"])
def test_padded_sentences_are_scored(family: str) -> None:
    model, x = make_causal_of_sentences(family), symbols()
    mask = (torch.arange(LENGTH) >= 3).long().expand(6, -1)
    output = model(x.masked_fill(mask == 0, K), attention_mask=mask, labels=x.masked_fill(mask == 0, -100))
    if family == "transformer":
        assert output.logits.shape == (6, LENGTH, K)
    else:
        torch.testing.assert_close(output.loss, -model.log_prob(x[:, 3:]).mean() / (LENGTH - 3 + 1))


def make_causal_of_sentences(family: str) -> hf.DflowForCausalLM:
    model = causal(family, explicit_length=True)
    model.set_length_counts(torch.tensor([0.0, 0, 3, 0, 5, 0, 2, 0, 1]))
    return model


@pytest.mark.parametrize("family", zoo.names("text"))
def test_what_it_does_not_give_is_refused(family: str) -> None:
    model, x = causal(family), symbols()
    assert model(x, output_hidden_states=False, use_cache=None) is not None
    for name in ("output_hidden_states", "output_attentions", "use_cache"):
        with pytest.raises(InputError, match=f"forward gives no {name} for a model of dflow: it"):
            model(x, **{name: True})
    with pytest.raises(InputError, match="no argument 'token_type_ids'"):
        model(x, token_type_ids=x)
    with pytest.raises(InputError, match="attention_mask has shape"):
        model(x, attention_mask=x[:, 1:])
    with pytest.raises(InputError, match="no symbol of row 0 is present"):
        model(x, attention_mask=torch.zeros_like(x))
    with pytest.raises(InputError, match="the number of symbols is part of the law"):
        model.resize_token_embeddings(K + 1)


def test_changes_of_the_law_are_those_of_transformers() -> None:
    logits = 3 * torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"temperature": 0.7, "top_k": 7, "top_p": 0.8, "min_p": 0.05}
    for chosen in ({"temperature"}, {"top_k"}, {"top_p"}, {"min_p"}, set(given)):
        values = {name: given[name] for name in given if name in chosen}
        warped = logits
        for name, value in values.items():
            warper = {"temperature": "Temperature", "top_k": "TopK", "top_p": "TopP", "min_p": "MinP"}[name]
            warped = getattr(logits_process, f"{warper}LogitsWarper")(value)(None, warped)
        torch.testing.assert_close(Controls(**values)(logits).softmax(-1), warped.softmax(-1))


@pytest.mark.parametrize("family", CAUSAL)
def test_lengths_are_counted_as_transformers_does(family: str) -> None:
    model = causal(family)
    prompts = torch.tensor([[K, K, 1], [2, 0, 4]])
    mask = (prompts < K).long()
    for arguments, width in [
        ({"max_new_tokens": 2}, 5),
        ({"max_length": 6}, 6),
        ({"generation_config": GenerationConfig(max_new_tokens=4)}, 7),
        ({"max_length": 4, "max_new_tokens": 5}, 8),
        ({}, LENGTH),
    ]:
        drawn = model.generate(prompts, attention_mask=mask, num_return_sequences=2, **arguments)
        assert drawn.shape == (4, width)
        assert torch.equal(drawn[:, :3], prompts.repeat_interleave(2, 0))
        assert 0 <= int(drawn[:, 3:].min()) <= int(drawn[:, 3:].max()) < K
    assert model.generate().shape == (1, LENGTH)
    assert model.generate(max_new_tokens=3, num_return_sequences=4).shape == (4, 3)
    for arguments, message in [
        (
            {"max_new_tokens": 6},
            "3 symbols of the prompt and 6 new ones are 9, and this model draws 8 at most",
        ),
        ({"max_length": 3}, "max_length 3 leaves no symbol to draw behind prompts of 3"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be a number of 1 or more"),
        ({"num_return_sequences": 0}, "num_return_sequences 0 must be"),
        ({"temperature": 0.0}, "temperature 0.0 must be above 0"),
    ]:
        with pytest.raises(InputError, match=message):
            model.generate(prompts, attention_mask=mask, **arguments)
    with pytest.raises(InputError, match="pad on the left"):
        model.generate(prompts.flip(1), attention_mask=mask.flip(1))
    with pytest.raises(InputError, match="outside"):
        model.generate(prompts)  # padding without a mask is no symbol
    with pytest.raises(InputError, match="give one of them"):
        model.generate(prompts, input_ids=prompts)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_seed_is_that_of_transformers_and_draws_are_exact(family: str) -> None:
    model, prompt = causal(family), torch.tensor([[3, 1], [0, 2]])

    def draw(**arguments: Any) -> Tensor:
        set_seed(4)
        return model.generate(prompt, max_new_tokens=1, num_return_sequences=3000, **arguments)

    drawn = draw()
    assert torch.equal(drawn, draw())
    assert not torch.equal(drawn, model.generate(prompt, max_new_tokens=1, num_return_sequences=3000))
    with torch.no_grad():
        law = model(prompt).logits[:, -1].softmax(-1)
    for row in range(2):
        shares = torch.bincount(drawn[3000 * row : 3000 * (row + 1), -1], minlength=K) / 3000
        assert (shares - law[row]).abs().max() < 0.04
    cold = draw(temperature=0.25, top_k=3)
    likely = law.topk(3).indices
    assert all(
        set(cold[3000 * row : 3000 * (row + 1), -1].tolist()) <= set(likely[row].tolist()) for row in (0, 1)
    )


@pytest.mark.parametrize(
    ("family", "context"), [("lstm", 0), ("transformer", 0), ("ngram", 0), ("grouped", 6)]
)
def test_prompts_of_a_batch_are_continued_as_alone(family: str, context: int) -> None:
    model = causal(family, context=context)
    prompts = torch.tensor([[3, 1, 2], [0, 2, 2], [4, 4, 0]])
    set_seed(3)
    together = model.generate(prompts, max_new_tokens=5)
    set_seed(3)
    noise = Noise.of(None, 1, model.device)
    for number, (prompt, drawn) in enumerate(zip(prompts, together, strict=True)):
        alone = hf.DflowModel.generate(
            model, 1, LENGTH, prompt=prompt, noise=Noise(noise.seed, torch.tensor([number]))
        )
        assert torch.equal(alone[0], drawn)


@torch.no_grad()
@pytest.mark.parametrize("family", CAUSAL)
def test_greedy_takes_the_likeliest_symbol_each_time(family: str) -> None:
    model, x = causal(family), symbols(3, 2)
    expected = x
    for _ in range(5):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    for seed in (0, 1):
        set_seed(seed)
        assert torch.equal(model.generate(x, do_sample=False, max_new_tokens=5, temperature=0.3), expected)


def test_greedy_takes_the_first_of_equals() -> None:
    model = causal("lstm")
    with torch.no_grad():
        model.distribution.net.head.weight.zero_()
        model.distribution.net.head.bias.copy_(torch.tensor([0.0, 1, 0, 1, 1]))
    assert model.generate(do_sample=False, num_return_sequences=2).tolist() == [[1] * LENGTH] * 2


@pytest.mark.parametrize("context", [0, 6])
def test_drafts_change_no_sample(context: int) -> None:
    model, prompts = causal("transformer", context=context), torch.tensor([[3, 1, 2], [0, 2, 2]])
    drafted = model.drafted(causal("ngram", context=context))
    for arguments in ({}, {"temperature": 0.6, "top_k": 3}, {"do_sample": False}):
        set_seed(0)
        expected = model.generate(prompts, max_new_tokens=5, **arguments)
        set_seed(0)
        assert torch.equal(drafted.generate(prompts, max_new_tokens=5, **arguments), expected)
    assert drafted.tally is not None
    assert drafted.tally.drafted > 0


@pytest.mark.parametrize("family", [name for name in OTHERS if not zoo.find(name).left_to_right])
def test_greedy_is_refused_where_it_has_no_meaning(family: str) -> None:
    with pytest.raises(
        InputError, match=f"do_sample=False is not available: a {family} model does not draw one"
    ):
        causal(family).generate(do_sample=False)
    with pytest.raises(InputError, match="draws the length of a text first"):
        make_causal_of_sentences("transformer").generate(do_sample=False)


@pytest.mark.parametrize("family", zoo.names("text"))
def test_prompts_of_any_family_are_continued_or_refused(family: str) -> None:
    model, prompt = causal(family), torch.tensor([[3, 1], [K, 2]])
    mask = (prompt < K).long()
    if model.config.record.prompt == "no":
        with pytest.raises(InputError, match="cannot continue a prompt; use one"):
            model.generate(prompt, attention_mask=mask)
        return
    drawn = model.generate(prompt, attention_mask=mask, max_new_tokens=3)
    assert torch.equal(drawn[:, :2], prompt)
    assert int(drawn[:, 2:].max()) < K


def test_texts_that_end_are_filled_up() -> None:
    model = make_causal_of_sentences("transformer")
    set_seed(0)
    drawn = model.generate(num_return_sequences=60)
    assert set((drawn < K).sum(1).tolist()) == {2, 4, 6, 8} | set((drawn < K).sum(1).tolist())
    assert bool((drawn == K).any())
    assert model.generate(num_return_sequences=60, max_new_tokens=3).shape == (60, 3)
    assert int(model.generate(num_return_sequences=60, pad_token_id=0).max()) < K
    # Behind a symbol that ends a text.
    plain = causal("transformer")
    set_seed(0)
    whole = plain.generate(num_return_sequences=40)
    set_seed(0)
    cut = plain.generate(num_return_sequences=40, eos_token_id=[2])
    for row, other in zip(whole.tolist(), cut.tolist(), strict=True):
        end = row.index(2) + 1 if 2 in row else LENGTH
        assert other[:end] == row[:end]
        assert set(other[end:]) <= {K}


def test_models_with_a_context_draw_any_length() -> None:
    model = causal("grouped", context=4)
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20).shape == (1, 23)
    assert model.generate(torch.tensor([[1, 2, 3]])).shape == (1, 3 + LENGTH)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not available: dflow draws samples and searches no beams"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not available: .* temperature, top_k"),
        ({"typical_p": 0.5}, "typical_p=0.5 is not available: dflow cuts a law by top_k, top_p or min_p"),
        ({"min_new_tokens": 3}, "min_new_tokens=3 is not available: .* draw again"),
        ({"stop_strings": "x"}, "stop_strings='x' is not available: .*dflow generate --stop"),
        ({"assistant_model": object()}, "assistant_model=object is not available: model.drafted"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True .* model.log_prob_each"),
        ({"streamer": object()}, "streamer=object is not available: symbols are returned together"),
        ({"logits_processor": [1]}, "logits_processor=list is not available"),
        ({"temprature": 2}, "no argument 'temprature'; did you mean 'temperature'"),
    ],
)
def test_other_ways_to_generate_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        causal("ngram").generate(**arguments)


def test_arguments_that_ask_for_nothing_pass() -> None:
    model = causal("lstm")
    set_seed(0)
    expected = model.generate()
    set_seed(0)
    defaults = GenerationConfig(**GenerationConfig._get_default_generation_params())
    assert model.generate(generation_config=GenerationConfig(num_beams=1, repetition_penalty=1.0)).equal(
        expected
    )
    defaults.do_sample, defaults.max_length = True, LENGTH
    assert model.generate(generation_config=defaults, use_cache=False, min_length=0).shape == (1, LENGTH)


@pytest.mark.parametrize("family", zoo.names("text"))
def test_gradients_reach_every_parameter_and_evaluation_is_deterministic(family: str) -> None:
    model, x = causal(family), symbols(40)
    assert torch.equal(model(x, labels=x).loss, model(x, labels=x).loss)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x, labels=x).loss, model(x, labels=x).loss)
    assert math.isfinite(float(model(x, labels=x).loss.detach()))
    model.train()(x, labels=x).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert idle == []


@pytest.mark.parametrize("family", zoo.names("text"))
def test_saved_and_loaded_it_is_the_same(family: str, tmp_path: Path) -> None:
    model, x = causal(family), symbols()
    model.save_pretrained(tmp_path)
    again, info = hf.DflowForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    # No weights are tied, so that no file lacks any.
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    assert again.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    assert torch.equal(again.eval()(x, labels=x).loss, model(x, labels=x).loss)
    # The other class of the same folder.
    assert torch.equal(hf.load(tmp_path).log_prob(x), model.log_prob(x))
    make_model(family, K).save_pretrained(tmp_path / "plain")
    assert hf.DflowForCausalLM.from_pretrained(tmp_path / "plain").generation_config.top_k == 0
