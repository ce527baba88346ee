"""What messages cost is measured with torch's own transport, not guessed."""

from scpl.engine import sending


def test_a_large_message_costs_more_and_a_sum_more_than_that(monkeypatch):
    monkeypatch.setattr(sending, "LARGE", 2**23)  # far above whatever else runs
    costs = sending.measure_messages()
    assert 0 < costs.message < 0.1
    assert 0 < costs.byte < 1e-7
    assert costs.of(2**23) > 10 * costs.message
    assert costs.added > costs.byte, "each byte of it is also read and added"
