"""The recipe of training by value: every step is computed a second time, by hand, from what went into it."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from folders import SETTINGS, image_recipe, write_pictures, write_text
from forks import FORKS
from safetensors.torch import load_file
from test_processes import environ, free_port, metrics
from torch import Tensor
from watch import Call, Step, Watch

from dflow import hf, objectives
from dflow.data import Corpus, DataConfig, load
from dflow.distributions import Categorical
from dflow.train import Schedule, TrainConfig, load_recipe, loop, schedule, train
from dflow.train.material import mix
from dflow.train.tasks import task_of

LENGTH = 16


def recipe_file(
    folder: Path, family: str, model: dict[str, Any], protocol: str = "stream", **settings: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    usual = {"batch_size": 8, "samples": 0, "trackers": []}
    values = {
        "data": {"name": str(write_text(folder)), "protocol": protocol},
        "model": {"family": family, "length": LENGTH, **SETTINGS[family], **model},
        "train": usual | settings,
        "output": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@dataclass
class Watched:
    """A training that is over, what was seen of it, and its data."""

    out: Path
    config: TrainConfig
    watch: Watch
    corpus: Corpus

    @property
    def steps(self) -> list[Step]:
        return self.watch.steps

    @property
    def calls(self) -> list[Call]:
        return self.watch.calls

    def objective(self, step: int, before: bool = True) -> objectives.Objective:
        """The objective as it was at a step."""
        found: objectives.Objective = copy.deepcopy(self.watch.objective)
        weights = self.steps[step].before if before else self.steps[step].after
        found.distribution.load_state_dict(weights, strict=False)
        return found.train()

    def averages(self) -> list[dict[str, Tensor]]:
        """After each step the moving average of weights, in float64."""
        average = {n: p.double() for n, p in self.steps[0].before.items()}
        rows = []
        for t, step in enumerate(self.steps):
            decay = min(self.config.ema, (1 + t) / (10 + t))
            average = {n: decay * average[n] + (1 - decay) * p.double() for n, p in step.after.items()}
            rows.append(average)
        return rows

    def valid_bits(self, model: hf.DflowModel) -> float:
        """Bits a character of the first 128 chunks of the validation text; one symbol is one character."""
        ids, lengths = self.corpus.valid.chunks(model.config.length, 128)
        with torch.no_grad():
            nats = -float(model.eval().log_prob(ids, lengths).double().sum())
        # A sentence ends with a line feed.
        characters = ids.numel() if lengths is None else int(lengths.sum()) + len(lengths)
        return nats / math.log(2) / characters


def watched(
    folder: Path, family: str, model: dict[str, Any], protocol: str = "stream", **settings: Any
) -> Watched:
    recipe = load_recipe(recipe_file(folder, family, model, protocol, **settings))
    with Watch() as watch:
        out = train(recipe)
    return Watched(out, recipe.train, watch, load(DataConfig(str(folder / "text.txt"), protocol=protocol)))  # type: ignore[arg-type]


#: A model that is drawn in one of three numbers of calls, clipped at every step.
CLIP, BUDGETS = 0.05, [1, 2, 4]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return watched(
        tmp_path_factory.mktemp("grouped"), "grouped", {"calls": [1, 4], "ngram_rows": 5, "block": 2},
        steps=40, eval_every=5, warmup=8, learning_rate=0.02, final_learning_rate=0.1, weight_decay=0.3,
        clip=CLIP, ema=0.5, seed=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Three steps of four pieces each, without a limit of the gradient, on rows of different lengths."""
    return watched(
        tmp_path_factory.mktemp("sentences"), "transformer", {"length": 64}, "sentence",
        steps=3, eval_every=1, warmup=1, accumulation=4, clip=0.0, ema=0.9,
    )  # fmt: skip


@pytest.fixture(scope="module")
def gumbel(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return watched(
        tmp_path_factory.mktemp("gumbel"), "bipartite", {},
        steps=8, eval_every=4, warmup=1, learning_rate=0.03, rule="gumbel", refit_batches=3,
        base_momentum=0.9,
        temperature={"start": 1.0, "end": 0.25, "schedule": "exponential", "until": 0.5},
        peak={"start": 0.5, "end": 0.1, "until": 0.5},
    )  # fmt: skip


# -- learning rate -------------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(grouped: Watched) -> None:
    assert len(grouped.steps) == 40
    rates = [step.groups[0]["lr"] for step in grouped.steps]
    # Of 40 steps to a tenth of the peak: warm-up, its end, the middle, three quarters, the last.
    for step, share in [(0, 1 / 8), (3, 4 / 8), (7, 1), (20, 1), (30, 1), (39, 1)]:
        half = (1 + math.cos(math.pi * step / 40)) / 2
        assert rates[step] == pytest.approx(0.02 * share * (0.1 + 0.9 * half), rel=1e-12)
    assert rates[20] == pytest.approx(0.02 * 0.55)
    assert rates.index(max(rates)) == 7
    assert all(group["lr"] == step.groups[0]["lr"] for step in grouped.steps for group in step.groups)
    logged = {row["step"]: row["learning_rate"] for row in metrics(grouped.out)}
    assert logged == {step: rates[step - 1] for step in range(5, 41, 5)}


def test_the_learning_rate_without_warm_up_starts_at_the_peak_and_ends_at_the_share_asked_for() -> None:
    config = TrainConfig(steps=10, learning_rate=0.5, warmup=0)
    assert schedule.learning_rate(config, 0, 0.0) == 0.5
    assert schedule.learning_rate(config, 10, 1.0) == pytest.approx(0, abs=1e-15)
    for final in (0.2, 1.0):
        config = TrainConfig(steps=10, learning_rate=0.5, warmup=2, final_learning_rate=final)
        assert schedule.learning_rate(config, 10, 1.0) == pytest.approx(0.5 * final)
        assert schedule.learning_rate(config, 5, 0.5) == pytest.approx(0.25 * (1 + final))


def test_the_budget_that_is_nearer_to_its_end_counts() -> None:
    both = TrainConfig(steps=200, minutes=5)
    assert schedule.fraction(both, 50, 60) == 0.25
    assert schedule.fraction(both, 50, 150) == 0.5
    assert schedule.fraction(both, 50, 301) == 1
    assert schedule.fraction(TrainConfig(steps=200), 50, 1e9) == 0.25
    assert schedule.fraction(TrainConfig(minutes=5), 10**9, 75) == 0.25


def test_a_budget_in_minutes_moves_the_learning_rate_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock of which every look takes a second."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    path = recipe_file(tmp_path, "transformer", {}, minutes=0.5, eval_every=1, warmup=2, learning_rate=0.01)
    rows = metrics(train(load_recipe(path)))
    assert 5 < len(rows) < 31
    assert rows[-2]["seconds"] < 30 <= rows[-1]["seconds"]
    times = [0.0, *(row["seconds"] for row in rows)]
    assert all(a < b for a, b in pairwise(times))
    for row, spent in zip(rows, times, strict=False):
        half = (1 + math.cos(math.pi * spent / 30)) / 2
        assert row["learning_rate"] == pytest.approx(0.01 * half * min(1, row["step"] / 2))


def test_evaluations_come_ten_times_in_a_budget_unless_told_otherwise() -> None:
    tenth = schedule.interval
    assert tenth(TrainConfig(steps=95), None) == ("steps", 10)
    assert tenth(TrainConfig(minutes=5), None) == ("seconds", 30)
    assert tenth(TrainConfig(steps=95, minutes=5), None) == ("seconds", 30)
    assert tenth(TrainConfig(steps=95, eval_minutes=2), None) == ("seconds", 120)
    assert tenth(TrainConfig(minutes=5, eval_minutes=2), None) == ("seconds", 120)
    assert tenth(TrainConfig(minutes=5, eval_minutes=2), 7) == ("steps", 7)


# -- what a step does ----------------------------------------------------------------------------------------


def by_hand(steps: list[Step]) -> list[dict[str, Tensor]]:
    """Weights after each step of AdamW (Loshchilov and Hutter 2019), from weights and gradients before."""
    first = {n: torch.zeros_like(g, dtype=torch.float64) for n, g in steps[0].gradients.items()}
    second, rows = copy.deepcopy(first), []
    for t, step in enumerate(steps, 1):
        row = {}
        for name, g in step.gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * g.double()
            second[name] = 0.99 * second[name] + 0.01 * g.double().square()
            m, v = first[name] / (1 - 0.9**t), second[name] / (1 - 0.99**t)
            rate = step.groups[0]["lr"]
            decay = 0.3 if g.ndim >= 2 else 0.0
            row[name] = step.before[name].double() * (1 - rate * decay) - rate * m / (v.sqrt() + 1e-8)
        rows.append(row)
    return rows


def test_every_step_is_that_of_adamw_with_decay_of_matrices_alone(grouped: Watched) -> None:
    for step, row in zip(grouped.steps, by_hand(grouped.steps), strict=True):
        for name, p in row.items():
            torch.testing.assert_close(step.after[name].double(), p, rtol=1e-5, atol=1e-7)
    for a, b in pairwise(grouped.steps):
        assert all(torch.equal(a.after[n], b.before[n]) for n in a.after)


def test_vectors_do_not_decay_and_matrices_do_even_without_a_gradient(grouped: Watched) -> None:
    first = grouped.steps[0]
    plain = {n for n, i in first.group_of.items() if first.groups[i]["weight_decay"] == 0}
    assert plain == {n for n in first.group_of if n.endswith("bias") or "norm" in n}
    assert {first.groups[i]["weight_decay"] for n, i in first.group_of.items() if n not in plain} == {0.3}
    # Rows of the table of n-grams, whose gradient is zero until the n-gram is met, shrink all the same.
    model = copy.deepcopy(grouped.watch.objective)
    groups = schedule.parameter_groups(model.parameters(), 0.3)
    assert sum(len(g["params"]) for g in groups) == len(first.group_of)
    before = {n: p.detach().clone() for n, p in model.distribution.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW(groups, lr=0.5).step()
    for name, p in model.distribution.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 if name in plain else 1 - 0.5 * 0.3))


def gradient(run: Watched, step: int, batch: list[tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    """Of the mean nats an entry of a whole batch, by a single pass."""
    objective = run.objective(step)
    x = torch.cat([part for part, _ in batch])
    lengths = None if batch[0][1] is None else torch.cat([n for _, n in batch if n is not None])
    loss, _ = objective(x, lengths, run.calls[step].turn)
    (loss / (x.numel() if lengths is None else lengths.sum())).backward()
    return {n: p.grad for n, p in objective.distribution.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], scale: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(
            found[name], scale * g, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_gradient_that_is_too_long_is_cut_to_the_limit(grouped: Watched) -> None:
    for step in grouped.steps:
        assert step.norm == pytest.approx(CLIP, rel=1e-3)
    for number in (0, 11, 39):
        call = grouped.calls[number]
        whole = gradient(grouped, number, [(call.x, None)])
        norm = float(torch.stack([g.norm() for g in whole.values()]).norm())
        assert norm > 2 * CLIP
        close(grouped.steps[number].gradients, whole, CLIP / norm)


def test_pieces_of_a_batch_and_their_lengths_give_the_gradient_of_the_whole(sentences: Watched) -> None:
    assert len(sentences.calls) == 4 * len(sentences.steps) == 12
    for number, step in enumerate(sentences.steps):
        pieces = sentences.calls[4 * number : 4 * number + 4]
        assert [len(call.x) for call in pieces] == [2] * 4
        close(step.gradients, gradient(sentences, number, [(call.x, call.lengths) for call in pieces]))
    assert sentences.steps[0].norm > 0.5  # nothing was cut
    row = metrics(sentences.out)[-1]
    pieces = sentences.calls[8:]
    symbols = sum(int(call.lengths.sum()) for call in pieces if call.lengths is not None)
    nats = sum(float(call.loss) for call in pieces)
    assert row["train_loss_bits"] == pytest.approx(nats / math.log(2) / symbols, abs=1e-4)


# -- batches and turns ---------------------------------------------------------------------------------------


def test_batches_are_those_of_the_seed_and_the_step(grouped: Watched, sentences: Watched) -> None:
    assert mix(3, 5) == int.from_bytes(hashlib.sha256(b"3,5").digest()[:7], "big")
    assert len({mix(1, 23), mix(12, 3), mix(123), mix(1, 2, 3)}) == 4
    for number, call in enumerate(grouped.calls):
        seeded = torch.Generator().manual_seed(mix(3, number))
        assert torch.equal(call.x, grouped.corpus.train.crops(8, LENGTH, seeded)[0])
        assert call.training
    assert len({tuple(call.x.flatten().tolist()) for call in grouped.calls}) == 40
    for number in range(3):
        x, lengths = sentences.corpus.train.crops(8, 64, torch.Generator().manual_seed(mix(0, number)))
        pieces = sentences.calls[4 * number : 4 * number + 4]
        assert torch.equal(torch.cat([call.x for call in pieces]), x)
        assert torch.equal(torch.cat([call.lengths for call in pieces if call.lengths is not None]), lengths)


def test_every_budget_of_a_model_has_its_turns_and_is_evaluated_by_its_own(grouped: Watched) -> None:
    turns = [call.turn for call in grouped.calls]
    assert turns == [mix(3 + 2, step) % 3 for step in range(40)]
    assert min(turns.count(turn) for turn in range(3)) >= 8
    # And the loss of a step is that of its turn.
    for number in (0, 7, 20):
        call, law = grouped.calls[number], grouped.objective(number).distribution
        costs = {calls: -float(law.at(calls).log_prob(call.x).detach().sum()) for calls in BUDGETS}
        assert float(call.loss) == pytest.approx(costs[BUDGETS[call.turn]], rel=1e-5)
        assert len({round(cost, 2) for cost in costs.values()}) == 3
    assert hf.load(grouped.out).num_calls == 2


def test_an_evaluation_after_another_budget_is_by_the_models_own(tmp_path: Path) -> None:
    run = watched(
        tmp_path, "grouped", {"calls": [1, 4], "block": 2}, steps=6, eval_every=6, seed=3, learning_rate=0.05
    )
    assert BUDGETS[run.calls[-1].turn] == 1
    [row] = metrics(run.out)
    model = hf.load(run.out)
    costs = {calls: run.valid_bits(model.at(calls)) for calls in BUDGETS}
    assert row["valid_bits"] == pytest.approx(costs[2], abs=2e-5)
    assert len({round(cost, 3) for cost in costs.values()}) == 3


def test_any_order_models_learn_from_all_places_and_from_all_shares_known(tmp_path: Path) -> None:
    run = watched(tmp_path, "any_order", {"order": "random"}, steps=12, eval_every=12)
    assert len(run.watch.known) == 12
    known = torch.stack(run.watch.known)
    assert len({tuple(mask.flatten().tolist()) for mask in known}) == 12
    # Of eight rows of sixteen entries: numbers of known ones two apart, from a random first.
    numbers = known.sum(2).sort(1).values
    assert (numbers.diff(dim=1) == 2).all()
    assert set(numbers[:, 0].tolist()) == {0, 1}
    share = known.double().mean((0, 1))
    # Uniform over 0..15 known entries: 15 of 32 of all rows know a place; 96 rows.
    assert float((share - 15 / 32).abs().max()) < 4 * math.sqrt(0.25 / 96)


def test_pictures_are_turned_round_half_of_the_time_where_asked_for(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 24, 3)
    data = {"name": str(pictures), "valid": 0.2, "test": 0.2}
    plain, turning = (
        task_of(load_recipe(image_recipe(tmp_path, data | {"flip": flip}, batch_size=400)), False)
        for flip in (False, True)
    )
    rows, turned = plain.data.batch(7)[0], turning.data.batch(7)[0]
    assert torch.equal(rows, plain.data.images.train.crops(400, 192, torch.Generator().manual_seed(7))[0])  # type: ignore[attr-defined]
    mirrored = rows.view(-1, 3, 8, 8).flip(3).flatten(1)
    one, other = (turned == rows).all(1), (turned == mirrored).all(1)
    assert (one ^ other).all()
    assert abs(int(other.sum()) - 200) < 5 * 10


# -- moving average ------------------------------------------------------------------------------------------


def test_the_moving_average_is_what_is_evaluated_and_saved(grouped: Watched, sentences: Watched) -> None:
    for run in (grouped, sentences):
        averages, model = run.averages(), hf.load(run.out)
        rows = metrics(run.out)
        for row in rows:
            weights = averages[int(row["step"]) - 1]
            model.distribution.load_state_dict({n: p.float() for n, p in weights.items()}, strict=False)
            assert run.valid_bits(model) == pytest.approx(row["valid_bits"], abs=2e-5)
        best = min(rows, key=lambda row: row["valid_bits"])
        expected = averages[int(best["step"]) - 1]
        saved = load_file(run.out / "model.safetensors")
        state = load_file(run.out / "state.safetensors")
        for name, average in expected.items():
            torch.testing.assert_close(saved[f"distribution.{name}"].double(), average, rtol=1e-5, atol=1e-7)
            last = state[f"averaged.distribution.{name}"].double()
            torch.testing.assert_close(last, averages[-1][name], rtol=1e-5, atol=1e-7)
            assert torch.equal(state[f"model.distribution.{name}"], run.steps[-1].after[name])
            assert not torch.equal(last.float(), run.steps[-1].after[name])


def test_a_young_average_forgets_faster() -> None:
    assert [schedule.average_decay(0.5, t) for t in (0, 1, 8, 9)] == [0.1, 2 / 11, 0.5, 0.5]
    assert schedule.average_decay(0.999, 90) == 0.91
    assert schedule.average_decay(0.999, 10**6) == 0.999


def test_without_an_average_the_weights_themselves_are_saved(gumbel: Watched) -> None:
    rows = metrics(gumbel.out)
    best = min(rows, key=lambda row: row["valid_bits"])
    saved = load_file(gumbel.out / "model.safetensors")
    for name, p in gumbel.steps[int(best["step"]) - 1].after.items():
        assert torch.equal(saved[f"distribution.{name}"], p)


# -- flows: noise, temperature, base -------------------------------------------------------------------------


def test_noise_temperature_and_pull_follow_their_schedules(gumbel: Watched) -> None:
    assert len(gumbel.calls) == 8
    # The model itself was evaluated after the fourth step, and trained again.
    assert all(call.training for call in gumbel.calls)
    noise, temperature, peak = zip(
        *[(call.noise, call.temperature, call.peak) for call in gumbel.calls], strict=True
    )
    assert noise == tuple([pytest.approx(1 - step / 8)] for step in range(8))
    quarters = [1.0, 0.5**0.5, 0.5, 0.5**1.5, 0.25, 0.25, 0.25, 0.25]
    assert temperature == tuple([pytest.approx(value)] for value in quarters)
    # Where its schedule ends the pull ends too.
    assert peak == (0.5, pytest.approx(0.4), pytest.approx(0.3), pytest.approx(0.2), 0, 0, 0, 0)


def test_a_schedule_holds_its_end() -> None:
    for name, middle in [("linear", 2.5), ("cosine", 2.5), ("exponential", 2.0), ("constant", 4.0)]:
        moved = Schedule(4.0, 1.0, name, until=0.5)
        assert moved.at(0.25) == pytest.approx(middle)
        assert moved.at(0) == 4
        assert moved.at(0.5) == moved.at(0.9) == pytest.approx(4 if name == "constant" else 1)


def exact_loss(run: Watched, step: int) -> float:
    """Minus the likelihood of a batch as the model was at a step, with the base as it was."""
    law, call = run.objective(step).eval().distribution, run.calls[step]
    base = objectives.closed_form(law)
    assert base is not None
    assert call.counts is not None
    assert call.peak is not None
    base.assign(call.counts)
    base.peak = call.peak
    return -float(law.log_prob(call.x).detach().sum())


def test_rule_gumbel_trains_under_noise_and_straight_through_without(gumbel: Watched, tmp_path: Path) -> None:
    assert all(abs(float(gumbel.calls[n].loss) / exact_loss(gumbel, n) - 1) > 0.01 for n in range(4))
    plain = watched(tmp_path, "bipartite", {}, steps=4, eval_every=4, warmup=1, rule="straight_through")
    assert [call.noise for call in plain.calls] == [[0.0]] * 4
    assert [call.temperature for call in plain.calls] == [[1.0]] * 4
    assert [call.peak for call in plain.calls] == [0.0] * 4
    for step, call in enumerate(plain.calls):
        assert float(call.loss) == pytest.approx(exact_loss(plain, step), rel=1e-5)
    loud = watched(
        tmp_path / "loud", "bipartite", {}, steps=4, rule="straight_through", noise={"start": 0.5, "end": 0.0}
    )
    assert [call.noise for call in loud.calls] == [[0.5], [0.375], [0.25], [0.125]]


def latent_counts(law: Any, base: Categorical, x: Tensor) -> Tensor:
    """How often each symbol stands at each class of places in the latents, counted one by one."""
    z, _ = law.transform(x)
    counts = torch.zeros_like(base.counts)
    for row in z.tolist():
        for place, symbol in enumerate(row):
            counts[int(base.classes[place]), symbol] += 1
    return counts


def test_a_base_remembers_while_training_and_is_exact_at_an_evaluation(gumbel: Watched) -> None:
    # In training: a running average, which evaluations in between do not disturb.
    for a, b in pairwise(gumbel.calls):
        assert a.counts is not None
        assert a.statistics is not None
        assert a.statistics.sum() == a.x.numel()
        torch.testing.assert_close(b.counts, 0.9 * a.counts + a.statistics)
    last = gumbel.calls[-1]
    assert last.counts is not None
    state = load_file(gumbel.out / "state.safetensors")
    [name] = [n for n in state if n.startswith("model.") and n.endswith("counts") and "length" not in n]
    torch.testing.assert_close(state[name], 0.9 * last.counts + last.statistics)
    # At an evaluation: the marginals of the latents of the next batches, and nothing else.
    rows = metrics(gumbel.out)
    assert [row["step"] for row in rows] == [4, 8]
    for row in rows:
        step = int(row["step"])
        model = hf.load(gumbel.out)
        law: Any = model.distribution
        law.load_state_dict(gumbel.steps[step - 1].after, strict=False)
        base = objectives.closed_form(law)
        assert base is not None
        saved = base.counts.clone()
        batches = [
            gumbel.corpus.train.crops(8, LENGTH, torch.Generator().manual_seed(mix(0, step + i)))[0]
            for i in range(3)
        ]
        counts = torch.stack([latent_counts(law, base, x) for x in batches]).sum(0)
        assert counts.sum() == 3 * 8 * LENGTH
        if row["valid_bits"] == min(r["valid_bits"] for r in rows):
            assert torch.equal(saved, counts)
        base.assign(counts)
        assert gumbel.valid_bits(model) == pytest.approx(row["valid_bits"], abs=2e-5)


def test_memory_of_a_density_grows_with_the_training_where_the_dequantizer_moves(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 24, 1, 8)
    data = {"name": str(pictures), "valid": 0.2, "test": 0.2}
    for dequantizer, start, later in (("uniform", 0.98, 0.98), ("normal", 31 / 32, 1 - 1 / 41)):
        path = image_recipe(tmp_path, data, {"density": "diagonal", "dequantizer": dequantizer})
        task = task_of(load_recipe(path), False)
        assert task.method.momentum(0, 0.0) == start
        assert task.method.momentum(18, 0.5) == pytest.approx(later)
        assert task.method.momentum(10**6, 1.0) == 0.98


# -- several processes ---------------------------------------------------------------------------------------


def observe(rank: int, port: int, recipe: Path, report: Path) -> None:
    """One of two processes that train; what it saw goes into a file."""
    torch.set_num_threads(1)
    environ(rank, 2, port)
    with Watch() as watch:
        train(load_recipe(recipe))
    steps = [{"gradients": step.gradients, "before": step.before} for step in watch.steps]
    calls = [vars(call) for call in watch.calls]
    torch.save({"calls": calls, "steps": steps, "dropped": watch.dropped}, report)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, forks: None) -> tuple[Path, list[dict[str, Any]]]:
    """A flow trained by two processes, in two pieces each, under dropout and Gumbel noise; what each saw."""
    folder = tmp_path_factory.mktemp("pair")
    recipe = recipe_file(
        folder, "bipartite", {"dropout": 0.25}, rule="gumbel", base_momentum=0.9,
        steps=3, eval_every=3, warmup=1, accumulation=2, clip=0.0, seed=4, learning_rate=0.03,
    )  # fmt: skip
    port, files = free_port(), [folder / f"{rank}.pt" for rank in range(2)]
    processes = [FORKS.Process(target=observe, args=(r, port, recipe, file)) for r, file in enumerate(files)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return recipe, [torch.load(file) for file in files]


def test_no_two_pieces_steps_or_processes_drop_the_same(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    masks = [mask for seen in pair[1] for mask in seen["dropped"]]
    # Of three steps, two processes, two pieces, two layers, two dropouts each.
    assert len(masks) == 48
    entries = torch.cat([mask.flatten() for mask in masks])
    assert abs(float(entries.double().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(entries))
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks)


def test_two_processes_have_the_gradient_and_the_counts_of_the_whole_batch(
    pair: tuple[Path, list[dict[str, Any]]],
) -> None:
    recipe, reports = pair
    objective: Any = task_of(load_recipe(recipe), False).method.objective.train()
    base, [estimator] = objectives.closed_form(objective.distribution), objectives.estimators(objective)
    assert base is not None
    text = load(DataConfig(str(recipe.parent / "text.txt"))).train
    for number in range(3):
        x, _ = text.crops(8, LENGTH, torch.Generator().manual_seed(mix(4, number)))
        calls = [seen["calls"][2 * number : 2 * number + 2] for seen in reports]
        objective.distribution.load_state_dict(reports[0]["steps"][number]["before"], strict=False)
        base.assign(calls[0][0]["counts"])
        estimator.noise = 1 - number / 3
        objective.zero_grad()
        total = torch.zeros_like(base.counts)
        for rank in range(2):
            torch.manual_seed(mix(4 + 1 + rank, number))
            for piece, call in zip(x[rank::2].chunk(2), calls[rank], strict=True):
                assert torch.equal(call["x"], piece)
                loss, counts = objective(piece)
                assert float(loss.detach()) == pytest.approx(float(call["loss"]), rel=1e-5)
                (loss / x.numel()).backward()
                total += counts
        whole = {n: p.grad for n, p in objective.distribution.named_parameters()}
        for seen in reports:
            close(seen["steps"][number]["gradients"], whole)
            if number < 2:
                after = seen["calls"][2 * number + 2]["counts"]
                torch.testing.assert_close(after, 0.9 * base.counts + total)
