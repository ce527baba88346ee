"""Simulated training: what is known of schedules, and what must hold for any machines."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scpl.simulation.machines import Link, Machine, MessageCosts
from scpl.simulation.schedules import (
    SCHEDULES,
    Layers,
    Part,
    gpipe,
    in_flight,
    one_forward_one_backward,
    replicas,
    schedule,
    stream,
    zero_bubble,
)

PLAIN = Part(forward=1.0, backward=2.0, inputs=1.0)


def line(count, speed=1.0, **link):
    return [Machine(speed, Link(**link))] * count


def simulate(kind, machines, parts, micro_batches=4):
    if kind == "stream":
        return stream(machines, parts)
    if kind == "replicas":
        layers = [Layers(part.forward, part.backward, part.sends) for part in parts]
        return replicas(machines, layers, parts[0].update, parts[0].sends)
    return schedule(machines, parts, SCHEDULES[kind], micro_batches)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_stream_runs_at_the_pace_of_its_slowest_stage(count):
    parts = [PLAIN] * (count - 1) + [replace(PLAIN, backward=4.0)]
    assert stream(line(count), parts).seconds == pytest.approx(5.0)
    assert stream(line(count), [PLAIN] * count).wait_shares == pytest.approx([0.0] * count)


def test_a_stream_hides_a_link_that_is_fast_enough_and_not_one_that_is_slow():
    parts = [replace(PLAIN, sends=100.0)] * 3
    assert stream(line(3, rate=40.0), parts).seconds == pytest.approx(3.0)
    slow = stream(line(3, rate=10.0), parts)
    assert slow.seconds == pytest.approx(10.0)
    assert slow.sending == pytest.approx([10.0, 10.0, 0.0])
    assert slow.sent == pytest.approx([100.0, 100.0, 0.0])


@pytest.mark.parametrize(("ranks", "count"), [(2, 2), (4, 4), (4, 12)])
def test_gpipe_and_1f1b_have_the_bubble_of_the_books(ranks, count):
    """m of m + p - 1 slots are used; 1F1B needs as long, and holds p micro-batches, not m."""
    for order in (gpipe, one_forward_one_backward):
        done = schedule(line(ranks), [PLAIN] * ranks, order, count)
        assert count * 3.0 / done.seconds == pytest.approx(count / (count + ranks - 1))
    assert [in_flight(gpipe(rank, ranks, count)) for rank in range(ranks)] == [count] * ranks
    held = [in_flight(one_forward_one_backward(rank, ranks, count)) for rank in range(ranks)]
    assert held == [min(count, ranks - rank) for rank in range(ranks)]


@pytest.mark.parametrize(("ranks", "count"), [(2, 4), (4, 8)])
def test_two_halves_of_backward_fill_gaps(ranks, count):
    """ZB-H1: of the bubble (p - 1) (F + B) is left (p - 1) (F + inputs - weights)."""
    done = schedule(line(ranks), [PLAIN] * ranks, zero_bubble, count)
    assert done.seconds == pytest.approx(count * 3.0 + (ranks - 1) * 1.0)
    for rank in range(ranks):
        actions = zero_bubble(rank, ranks, count)
        assert in_flight(actions) <= ranks
        assert sorted(actions) == sorted(
            (kind, batch) for kind in ("forward", "inputs", "weights") for batch in range(count)
        )


def test_replicas_add_up_gradients_while_they_compute_others():
    """20 MB of the last layers are on their way while the first ones go backward."""
    layers = [Layers(1.0, 3.0, 1e6), Layers(1.0, 3.0, 20e6)]
    fast = replicas(line(4), layers, 0.5, 0.0)
    assert fast.seconds == pytest.approx(8.5)
    hidden = replicas(line(4, rate=10e6), layers, 0.5, 0.0)  # 2 * 3 / 4 of 20 MB: 3 seconds
    assert hidden.seconds == pytest.approx(8.5 + 2 * 3 / 4 * 1e6 / 10e6)
    assert hidden.sent == pytest.approx([1.5 * 21e6] * 4)


def test_messages_take_of_the_time_of_a_processor():
    """Eight machines with one core each were planned a fifth too fast for ddp."""
    costs = MessageCosts(message=0.01, byte=0.001, added=1e-7)
    busy = [Machine(2.0, Link(), costs)] * 3  # twice as fast, in this as well
    parts = [replace(PLAIN, sends=100.0)] * 3
    in_between = 3.0 + 2 * (3 * 0.01 + 100 * 0.001)  # receives and sends, three messages each time
    assert stream(busy, parts).seconds == pytest.approx(in_between / 2)
    done = schedule(busy, parts, gpipe, 8)
    # The middle one receives and sends an activation and a gradient for each micro-batch.
    assert done.work[1] == pytest.approx(8 * (3.0 + 4 * (0.01 + 100 * 0.001)) / 2)
    assert done.work[0] == pytest.approx(8 * (3.0 + 2 * (0.01 + 100 * 0.001)) / 2)
    layers = [Layers(1.0, 3.0, 20e6)]
    plain = replicas([Machine(2.0)] * 3, layers, 0.5, 0.0)
    halved = [Machine(2.0, Link(), MessageCosts(added=1e-7))] * 3
    assert replicas(halved, layers, 0.5, 0.0, compression=2.0).sent[0] == plain.sent[0] / 2
    summed = replicas(
        [replace(one, costs=MessageCosts(added=1e-7)) for one in busy], layers, 0.5, 0
    )
    assert summed.seconds - plain.seconds == pytest.approx(1e-7 * 2 * 2 / 3 * 20e6 / 2)


def test_a_machine_that_is_ahead_goes_on_while_gradients_are_added_up():
    """It waited for the slowest one at every bucket, even where messages cost nothing."""
    machines = [Machine(1.0, Link(10e6)), Machine(2.0, Link(10e6))]
    layers = [Layers(1.0, 3.0, 2e6), Layers(1.0, 3.0, 2e6)]
    found = replicas(machines, layers, 0.0, 0.0)
    assert found.seconds == pytest.approx(8.0 + 0.2), "the last ring; the first one is hidden"
    late = replicas(machines, layers, 0.0, 100e6)  # the second one's rows come after 10 seconds
    assert late.seconds == pytest.approx(10.0 + 4.0 + 0.2)


KINDS = st.sampled_from(["stream", "replicas", *SCHEDULES])
SECONDS = st.floats(0.01, 10.0)


@st.composite
def settings_of_a_line(draw):
    count = draw(st.integers(1, 4))
    costs = MessageCosts(*(draw(st.floats(0, 0.01)) for _ in range(3)))
    machines = [
        Machine(
            draw(st.floats(0.1, 4)), Link(draw(st.floats(1, 1e4)), draw(st.floats(0, 1))), costs
        )
        for _ in range(count)
    ]
    parts = [
        Part(
            forward=draw(SECONDS),
            backward=(backward := draw(SECONDS)),
            inputs=backward * draw(st.floats(0, 1)),
            update=draw(SECONDS),
            sends=draw(st.floats(0, 1000)),
        )
        for _ in range(count)
    ]
    return machines, parts


@settings(max_examples=60, deadline=None)
@given(KINDS, settings_of_a_line())
def test_whatever_the_machines(kind, given):
    machines, parts = given
    done = simulate(kind, machines, parts)
    # Nothing is faster than the work of a machine, or the load of a link.
    assert done.seconds >= max(*done.work, *done.sending) * (1 - 1e-6)
    assert all(0 <= share < 1 for share in done.wait_shares)
    # Slower links never help, and machines of twice the speed with links of twice the rate and
    # half the latency are twice as fast.
    slow = [replace(one, link=replace(one.link, rate=one.link.rate / 2)) for one in machines]
    assert simulate(kind, slow, parts).seconds >= done.seconds * (1 - 1e-6)
    twice = [
        replace(one, speed=2 * one.speed, link=Link(2 * one.link.rate, one.link.latency / 2))
        for one in machines
    ]
    assert simulate(kind, twice, parts).seconds == pytest.approx(done.seconds / 2)
    spared = [replace(one, costs=MessageCosts()) for one in machines]
    assert simulate(kind, spared, parts).seconds <= done.seconds * (1 + 1e-6)
