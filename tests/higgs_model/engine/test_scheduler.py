"""Who runs and who waits: decided without a tensor, so tested without one."""

import itertools

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from higgs_model.engine.blocks import BlockPool, content_keys
from higgs_model.engine.prompt import Positions
from higgs_model.engine.request import Request
from higgs_model.engine.scheduler import Scheduler
from higgs_model.engine.sequence import Phase, Sequence

SIZE, K = 4, 2
ARRIVALS = itertools.count()


def sequence(length, *, priority=0, voice=0, voice_length=0, max_frames=20):
    """A prompt that begins with a voice's positions and goes on with its own."""
    arrival = next(ARRIVALS)
    ids = np.concatenate([np.full(min(voice_length, length), voice), 1000 + arrival + np.arange(length)])[:length]
    prompt = Positions(ids, np.full((length, K), -1), np.empty((0, K), np.int64))
    request = Request(str(arrival), (0,), priority=priority, max_frames=max_frames)
    return Sequence(request, prompt, content_keys(prompt.content_PC, SIZE), arrival, K)


def scheduler(slots=4, blocks=60, prefill=16, idle=32):
    return Scheduler(BlockPool(blocks, SIZE), max_slots=slots, prefill_positions=prefill, idle_prefill_positions=idle)


def run_prompts(made):
    """One pass over prompts, as the engine makes it; the lengths of its spans."""
    list(made.adopt())
    planned = made.plan_prefill()
    for one, span in planned:
        for index in range(span.start // SIZE, min(span.stop // SIZE, len(one.keys))):
            made.pool.know(one.blocks[index], one.keys[index])
        one.computed = span.stop
        if span.stop == len(one.prompt):
            one.phase = Phase.SPEECH
    return [span.length for _, span in planned]


def speak(made, one):
    """One frame, as the engine takes it; False when its slot was lost."""
    made.grow(one)
    if one.phase is not Phase.SPEECH:
        return False
    one.launched += 1
    return True


def admitted(made, count):
    """Requests of the lowest priority in front, and so many slots given one after the other."""
    order = []
    for _ in range(count):
        one, _ = next(made.admit())
        order.append(one)
        made.remove(one)
    return order


def test_first_come_first_served_within_a_priority():
    made = scheduler(slots=1)
    requests = [sequence(5, priority=priority) for priority in (1, 0, 1, 0)]
    for one in requests:
        made.wait(one)
    assert admitted(made, 4) == [requests[number] for number in (1, 3, 0, 2)]


def test_nobody_waits_for_ever():
    """However many of a higher priority keep coming, every eighth slot goes to whoever came first."""
    made = scheduler(slots=1)
    patient = [sequence(5, priority=1) for _ in range(2)]
    for one in patient:
        made.wait(one)
    order = []
    for _ in range(32):
        made.wait(sequence(5))
        made.wait(sequence(5))
        order += admitted(made, 1)
    assert [order.index(one) for one in patient] == [7, 15]


def test_who_has_waited_longest_keeps_its_slot():
    made = scheduler(slots=2, blocks=7)
    patient = sequence(8, priority=1)
    made.wait(patient)
    for _ in range(7):
        made.wait(sequence(4))
        admitted(made, 1)
    assert [one for one, _ in made.admit()] == [patient]
    made.wait(sequence(4))
    hasty, _ = next(made.admit())
    while {patient.phase, hasty.phase} != {Phase.SPEECH}:
        run_prompts(made)
    while speak(made, patient):
        if hasty.phase is Phase.WAITING:
            break
    assert patient.phase is Phase.SPEECH


def test_a_long_prompt_is_not_overtaken():
    made = scheduler(slots=4, blocks=12)
    first, long = sequence(20), sequence(36)
    for one in (first, long, sequence(4), sequence(4)):
        made.wait(one)
    assert [one for one, _ in made.admit()] == [first]
    assert made.waiting == 3
    made.remove(first)
    assert next(iter(made.admit()))[0] is long


def test_between_two_frames_prompts_get_so_many_positions_and_no_more():
    made = scheduler(prefill=16, idle=32)
    made.wait(sequence(6))
    list(made.admit())
    assert run_prompts(made) == [6]
    for length in (100, 10):
        made.wait(sequence(length))
    list(made.admit())
    lengths = [run_prompts(made) for _ in range(8)]
    # The first gets on until it is done; the other has what is left of the last pass.
    assert lengths == [[16]] * 6 + [[4, 10], []]


def test_prompts_of_nobody_speaking_are_coalesced_at_once():
    made = scheduler(idle=32)
    for _ in range(4):
        made.wait(sequence(8))
    list(made.admit())
    assert run_prompts(made) == [8, 8, 8, 8]


@pytest.mark.parametrize(("speaking", "steps"), [(32, 1), (33, 9), (100, 9)])
def test_few_prompts_wait_for_company_while_many_speak(speaking, steps):
    made = scheduler(slots=120, blocks=600, idle=10_000)
    for _ in range(speaking):
        made.wait(sequence(4))
    list(made.admit())
    run_prompts(made)
    made.wait(sequence(4))
    list(made.admit())
    waited = next(step for step in itertools.count(1) if run_prompts(made))
    assert waited == steps


def test_enough_company_and_they_go_at_once():
    made = scheduler(slots=120, blocks=600, idle=10_000)
    for _ in range(100):
        made.wait(sequence(4))
    list(made.admit())
    run_prompts(made)
    for _ in range(4):
        made.wait(sequence(4))
        list(made.admit())
        lengths = run_prompts(made)
    assert lengths == [4, 4, 4, 4]


def test_a_voice_that_several_need_at_once_is_computed_once():
    made = scheduler(slots=8, blocks=200, prefill=100, idle=100)
    for _ in range(6):
        made.wait(sequence(30, voice=7, voice_length=22))
    list(made.admit())
    ran = [run_prompts(made) for _ in range(3)]
    assert ran[0] == [30]
    # Five blocks of the voice are whole; what follows is each prompt's own.
    assert sorted(itertools.chain(*ran[1:])) == [10] * 5
    assert made.counters.shared_positions == 5 * 20
    assert made.pool.shared == 5


class Life(RuleBasedStateMachine):
    """Requests come, run, lose their slots and go, in whatever order."""

    @initialize(slots=st.integers(1, 5), blocks=st.integers(14, 40))
    def begin(self, slots, blocks):
        self.made, self.slots = scheduler(slots=slots, blocks=blocks), slots
        self.everyone = []

    def of(self, data, *phases):
        there = [one for one in self.everyone if one.phase in phases]
        return data.draw(st.sampled_from(there)) if there else None

    @rule(length=st.integers(1, 30), voice=st.integers(0, 1), shared=st.integers(0, 20), priority=st.integers(0, 1))
    def come(self, length, voice, shared, priority):
        self.everyone.append(sequence(length, priority=priority, voice=voice, voice_length=shared))
        self.made.wait(self.everyone[-1])

    @rule()
    def admit(self):
        for one, shared in self.made.admit():
            assert list(shared) == list(range(one.computed // SIZE))

    @rule()
    def prompts(self):
        run_prompts(self.made)

    @rule(data=st.data())
    def frame(self, data):
        one = self.of(data, Phase.SPEECH)
        if one is not None and one.launched < 20:
            speak(self.made, one)

    @rule(data=st.data())
    def lose(self, data):
        one = self.of(data, Phase.PROMPT, Phase.SPEECH)
        if one is not None:
            self.made.preempt(one)

    @rule(data=st.data())
    def leave(self, data):
        one = self.of(data, Phase.WAITING, Phase.PROMPT, Phase.SPEECH)
        if one is not None:
            self.made.remove(one)

    @precondition(lambda self: hasattr(self, "made"))
    @invariant()
    def nothing_is_lost_or_in_two_hands(self):
        running = list(self.made.running.values())
        assert {one.slot for one in running} == self.made.running.keys()
        assert sorted([*self.made.running, *self.made._free_slots]) == list(range(self.slots))
        holders = {}
        for one in running:
            assert len(set(one.blocks)) == len(one.blocks)
            for index, block in enumerate(one.blocks):
                holders.setdefault(block, []).append((one, index))
        assert 0 not in holders
        assert len(holders) == self.made.pool.used
        for shared in holders.values():
            # Only what is full and final is in several hands, and then it stands for the same content.
            keys = {one.keys[index] if index < len(one.keys) else id(one) for one, index in shared}
            assert len(keys) == 1
        waiting = {id(one) for one in self.everyone if one.phase is Phase.WAITING}
        assert {id(one) for one in self.made._waiting} == waiting
        assert not any(one.blocks for one in self.everyone if one not in running)

    def teardown(self):
        if hasattr(self, "made"):
            for one in self.everyone:
                if one.phase is not Phase.ENDED:
                    self.made.remove(one)
            assert self.made.pool.used == self.made.waiting == 0
            assert len(self.made._free_slots) == self.slots


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
