"""The engine: whoever comes, goes or is cancelled, a request has the tokens that it has alone."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from star_elastic.errors import BudgetError, CheckpointError, ConfigError, LogitsError
from star_elastic.generate.engine import Engine, Generator
from star_elastic.generate.phases import (
    ByDifficulty,
    Generation,
    Phase,
    Plan,
    Sampling,
    Token,
    think_and_answer,
)
from star_elastic.generate.prompts import EncodedPrompt
from star_elastic.generate.sequence import Request
from star_elastic.generate.steps import StepPool
from tests.thinking import PLAIN, one, table_generator
from tests.tiny_family import PROMPTS

TURNS = (
    Phase(size="large", until="budget", budget=4, grace=0),
    Phase(size="small", until="end_of_thinking", budget=6, grace=2),
    Phase(size="large", until="line", budget=5, grace=0),
    Phase(size="small"),
)
UNSURE = ByDifficulty(small="small", large="large", threshold=1.0371)
PLANS = (
    think_and_answer("small", "large", thinking_budget=5, grace=3, max_new_tokens=18),
    think_and_answer("small", "small", max_new_tokens=15),
    think_and_answer("large", "large", thinking_budget=0, max_new_tokens=12),
    think_and_answer(UNSURE, "large", max_new_tokens=20, switch="catch-up"),
    Plan(TURNS, 30, "catch-up"),
    Plan(TURNS, 30, "reprefill"),
)
requests = st.builds(
    Request,
    st.sampled_from(PROMPTS),
    st.sampled_from(PLANS),
    st.sampled_from([Sampling(), Sampling(0.8), Sampling(1.3, 0.9)]),
    st.sampled_from(["3/0", "3/1"]),
)


@pytest.fixture(scope="module")
def alone(family):
    """The result of a request that an engine runs by itself."""
    known: dict[Request, Generation] = {}

    def run(request: Request) -> Generation:
        if request not in known:
            engine = Engine(family.generator)
            engine.add(request)
            *_, (_, known[request]) = engine.run()
        return known[request]

    return run


@given(
    asked=st.lists(requests, min_size=2, max_size=6),
    waits=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    cancelled=st.dictionaries(st.integers(0, 5), st.integers(0, 12), max_size=3),
    batch_size=st.sampled_from([1, 2, 64]),
)
@settings(max_examples=10)
def test_whoever_comes_and_goes_changes_nobody_elses_tokens(
    family, alone, asked, waits, cancelled, batch_size
):
    """Requests are added `waits` steps after one another, and some are `cancelled` so many steps
    after they came; the others have the tokens, texts and accounts that they have alone."""
    engine = Engine(family.generator, batch_size)
    results: dict[int, Generation] = {}
    told: dict[int, list[Token]] = {}
    due, ages = list(zip(asked, waits, strict=False)), {}
    while due or not engine.is_idle:
        while due and due[0][1] <= 0:
            number = engine.add(due.pop(0)[0])
            ages[number], told[number] = 0, []
        due[:1] = [(request, wait - 1) for request, wait in due[:1]]
        for number, age in ages.items():
            if cancelled.get(number) == age:
                engine.cancel(number)
        for number, event in engine.step():
            assert number not in results
            assert cancelled.get(number, 99) > ages[number], "a cancelled request goes on"
            if isinstance(event, Generation):
                results[number] = event
            else:
                told[number].append(event)
        ages = {number: age + 1 for number, age in ages.items()}
        assert len(engine._running) <= batch_size
    kept = [n for n in ages if n in results]
    assert all(n in cancelled for n in ages if n not in results)
    for number in kept:
        result, expected = results[number], alone(asked[number])
        assert result.token_ids == expected.token_ids
        assert result.token_sizes == expected.token_sizes
        assert result.reads == expected.reads
        assert tuple(token.id for token in told[number]) == result.token_ids
        assert "".join(token.text for token in told[number]) == result.text
        assert {token.index for token in told[number]} <= {number}
    assert not engine._waiting and not engine._running, "something is held for nobody"
    assert engine._batch is None or not engine._batch._decoder.num_bytes


class RunsOut(TorchFunctionMode):
    """Memory that runs out at some of torch's operations, counted from the first one on."""

    def __init__(self, places: set[int]):
        super().__init__()
        self.count, self._places = 0, places

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count in self._places:
            raise torch.OutOfMemoryError("out of memory")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("patience", [1, 99], ids=["static", "growing"])
@given(
    asked=st.lists(requests, min_size=2, max_size=4),
    places=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    is_cancelled=st.booleans(),
)
@settings(max_examples=10)
def test_wherever_memory_runs_out_the_tokens_are_the_same(
    family, alone, patience, asked, places, is_cancelled
):
    """A step that fails, at any operation, is one that everybody waits for and nothing else."""

    def run(places: set[int]) -> tuple[dict[int, Generation], dict[int, list[Token]], int]:
        whole = family.generator
        generator = Generator(whole.models, whole.tokenizer, whole.tags.end_of_thinking)
        generator._pool = cache(lambda size: StepPool(generator.model(size), patience))
        engine, told = Engine(generator), {number: [] for number in range(len(asked))}
        for request in asked:
            engine.add(request)
        results, num_failed = {}, 0
        with RunsOut(places) as memory:
            while not engine.is_idle:
                try:
                    if is_cancelled and memory.count > 2000:
                        engine.cancel(0)
                    events = engine.step()
                except torch.OutOfMemoryError:
                    num_failed += 1
                    continue
                for number, event in events:
                    if isinstance(event, Generation):
                        results[number] = event
                    else:
                        told[number].append(event)
        assert num_failed or patience == 1 or not places  # steps that cannot be captured run still
        return results, told, memory.count

    _, _, total = run(set())
    results, told, _ = run({1 + int(place * (total - 1)) for place in places})
    assert set(range(is_cancelled, len(asked))) <= set(results)
    for number, result in results.items():
        expected = alone(asked[number])
        assert result.token_ids == expected.token_ids
        assert result.token_sizes == expected.token_sizes
        assert result.text == "".join(token.text for token in told[number])
        assert tuple(token.id for token in told[number]) == result.token_ids
        known: dict[str, int] = {}
        for read in result.reads:  # from where it knew the tokens, or anew
            assert read.start == known.get(read.size) or (read.at_once and read.start == 0)
            known[read.size] = read.start + read.tokens


@pytest.fixture
def broken():
    """A generator whose model has no numbers for Y, which follows Z; and a plan for it."""
    generator = table_generator({"\n": "a", "a": "b", "b": "c", "c": "a", "Z": "Y"}, PLAIN)
    with torch.no_grad():
        row = one(generator.tokenizer, "Y")
        generator.model("small").get_input_embeddings().weight[row] = float("nan")
    return generator, think_and_answer("small", "small", max_new_tokens=12)


def test_requests_without_logits_are_named_and_ended_and_the_others_go_on(broken):
    generator, plan = broken
    expected = [result.text for result in generator.generate(["q", "qq"], plan)]
    engine, results = Engine(generator), {}
    for prompt in ("q", "qq"):
        engine.add(Request(prompt, plan))
        engine.step()
    named = [engine.add(Request("Y", plan)) for _ in range(2)]
    with pytest.raises(LogitsError, match="logits for requests 2, 3 are not finite; ") as error:
        engine.step()
    assert error.value.requests == tuple(named)
    for index in named:
        engine.cancel(index)  # does nothing any more
    for index, event in engine.run():
        results[index] = event
    assert [result.text for result in results.values()] == expected
    with pytest.raises(CheckpointError, match="for request 1 are not finite"):
        generator.generate(["q", "Y", "qq"], plan)


def test_what_is_no_number_does_not_stay_in_static_memory(broken):
    """There, it would lie under the mask of other rows, whose sums it spoils all the same."""
    generator, plan = broken
    generator._pool = cache(lambda size: StepPool(generator.model(size), patience=1))
    (expected,) = generator.generate("q", plan)
    engine = Engine(generator)
    ids = generator.encode("long " * 20, plan).ids
    prompt = EncodedPrompt((*ids, one(generator.tokenizer, "Z")), in_thinking=False, has_tags=False)
    for request in (Request("q", plan), Request(prompt, plan)):
        engine.add(request)
    engine.step()
    with pytest.raises(LogitsError, match="for request 1 "):
        engine.step()
    engine.add(Request("q", plan))
    texts = [event.text for _, event in engine.run() if isinstance(event, Generation)]
    assert texts == [expected.text] * 2


def test_cancelling_frees_rows_and_caches_at_once(family):
    """Of a request that waits, of one at work, and of one whose turn is another size's."""
    engine = Engine(family.generator, batch_size=3)
    slow = think_and_answer("small", "small", max_new_tokens=40)
    turn = Phase(size="small", until="budget", budget=1, grace=0)
    both = Plan((turn, TURNS[0], turn, *TURNS[1:]), 40, "catch-up")
    for prompt, plan in zip(PROMPTS, (both, slow, slow, slow), strict=False):
        engine.add(Request(prompt, plan))
    engine.step()
    batch = engine._batch
    (waiting,), (working, *others) = engine._waiting, [s.index for s in batch.sequences]
    (parted,) = engine._running.keys() - {working, *others}
    assert engine._running[parted].caches, "nothing is kept for its next turn"
    engine.cancel(waiting)
    engine.cancel(parted)
    assert list(engine._running) == [working, *others] and not engine._waiting
    held = batch._decoder.num_bytes
    engine.cancel(working)
    assert 0 < batch._decoder.num_bytes < held and len(batch._decoder) == len(others)
    engine.cancel(working)  # once more, and one that never was
    engine.cancel(99)
    for number in others:
        engine.cancel(number)
    assert engine.is_idle and engine.step() == []
    assert batch._decoder.num_bytes == len(batch._decoder) == 0


def test_no_size_waits_for_ever():
    """However many requests for one size come, one for another gets its turn."""
    generator = table_generator({"\n": "a", "a": "b", "b": "c", "c": "a"}, PLAIN)
    engine = Engine(generator)
    plan = {size: think_and_answer(size, size, max_new_tokens=5) for size in ("small", "large")}
    engine.add(Request("q", plan["small"], streams=False))
    other = None
    for number in range(40):
        engine.add(Request("q", plan["small"], streams=False))
        if number == 3:
            other = engine.add(Request("q", plan["large"], streams=False))
        if other in (index for index, _ in engine.step()):
            return
    raise AssertionError("the large size never gets its turn")


@pytest.mark.parametrize("batch_size, batch_tokens", [(2, 65_536), (64, 64)])
@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 9, 50])
def test_no_request_waits_for_ever(batch_size, batch_tokens, every, length):
    """However long its prompt is and whatever comes after it, one batch for each before it."""
    generator = table_generator({"\n": "a", "a": "b", "b": "c", "c": "a"}, PLAIN)
    engine = Engine(generator, batch_size, batch_tokens)
    plan = think_and_answer("small", "small", max_new_tokens=5)
    before = [Request("q" * n, plan, streams=False) for n in (1, 1, 30, 2, 12)]
    for request in before:
        engine.add(request)
    late = engine.add(Request("q" * length, plan, streams=False))
    for number in range(5 * (len(before) + 1)):
        if number % every == 0:
            engine.add(Request("q", plan, streams=False))
        if late in (index for index, _ in engine.step()):
            return
    raise AssertionError("it is overtaken again and again")


@pytest.mark.parametrize("gone", [[1], [2, 1], [1, 2]])
def test_who_is_cancelled_makes_room_at_once(gone):
    """Of two that run and one that waits; a newcomer, or the one that waits, takes the room."""
    generator = table_generator({"\n": "a", "a": "b", "b": "c", "c": "a"}, PLAIN)
    engine = Engine(generator, batch_size=2)
    long, short = (think_and_answer("small", "small", max_new_tokens=n) for n in (50, 5))
    for plan in (long, long, short):
        engine.add(Request("q", plan, streams=False))
    engine.step()
    for index in gone:
        engine.cancel(index)
    new = engine.add(Request("q", short, streams=False)) if 2 in gone else 2
    assert new in [index for _ in range(5) for index, _ in engine.step()]


def test_newcomers_join_those_that_run():
    generator = table_generator({"\n": "a", "a": "b", "b": "c", "c": "a"}, PLAIN)
    engine = Engine(generator, batch_size=3)
    plan = think_and_answer("small", "small", max_new_tokens=6)
    engine.add(Request("q", plan))
    seen = [[index for index, event in engine.step() if isinstance(event, Token)]]
    engine.add(Request("longer", plan))
    seen += [[i for i, event in engine.step() if isinstance(event, Token)] for _ in range(2)]
    assert seen == [[0], [0, 1], [0, 1]]
    engine.add(Request("q", plan))
    engine.add(Request("q", plan))  # no room: it comes in when nothing runs
    rest = [[i for i, event in engine.step() if isinstance(event, Token)] for _ in range(13)]
    assert rest[:3] == [[0, 1, 2]] * 3
    assert all((3 in both[1]) <= (set(both[1]) == {3}) for both in pairwise(rest))
    assert engine.is_idle


def test_a_request_that_cannot_be_done_is_refused_and_nothing_is_held(family):
    engine = Engine(family.generator)
    plan = think_and_answer("small", "large", thinking_budget=5, max_new_tokens=60)
    for request, error in (
        (Request(" ", plan), ConfigError),
        (Request("1" * 400, plan), BudgetError),
        (Request("1", think_and_answer("huge", "huge")), ConfigError),
    ):
        with pytest.raises(error):
            engine.add(request)
    assert engine.is_idle
    assert engine.add(Request("1", plan)) == 0
    for options in ({"batch_size": 0}, {"batch_tokens": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))}="):
            Engine(family.generator, **options)
