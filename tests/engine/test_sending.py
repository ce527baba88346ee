"""What messages cost is measured with torch's own transport, not guessed."""

from types import SimpleNamespace

import pytest

from scpl.engine import sending
from scpl.errors import LinkError


def test_a_large_message_costs_more_and_a_sum_more_than_that(monkeypatch):
    monkeypatch.setattr(sending, "LARGE", 2**23)  # far above whatever else runs
    costs = sending.measure_messages()
    assert 0 < costs.message < 0.1
    assert 0 < costs.byte < 1e-7
    assert costs.of(2**23) > 10 * costs.message
    assert costs.added > costs.byte, "each byte of it is sent, received and added"


def test_a_machine_that_cannot_reach_itself_is_told(monkeypatch):
    def refuse(hostname):
        raise RuntimeError(f"no address {hostname}\nand a long story")

    gloo = SimpleNamespace(_Options=SimpleNamespace, create_device=refuse)
    monkeypatch.setattr(sending, "ProcessGroupGloo", gloo)
    with pytest.raises(LinkError, match=r"over loopback.*no address 127\.0\.0\.1\W") as told:
        sending.measure_messages()
    assert "long story" not in str(told.value)
