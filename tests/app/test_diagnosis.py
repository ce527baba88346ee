import pytest

from scpl.app.train.recorder import advise

FLAT = {"above_chance": -0.001, "positives": 12.0, "without_positives": 0.0, "spread": 0.9}


@pytest.mark.parametrize(
    "observed",
    [
        {},
        {"spread": 0.0},
        {**FLAT, "above_chance": -0.3},
        {"accuracy": 0.2},
        {**FLAT, "accuracy": 0.5},
    ],
    ids=str,
)
def test_there_is_no_advice_for_a_stage_that_learns_or_of_which_nothing_is_known(observed):
    assert advise(0, observed, 10) is None


@pytest.mark.parametrize(
    ("observed", "words"),
    [
        (FLAT, ["Stage 2", "contrast -0.001", "raise --lr", "--cross-entropy 0.8"]),
        ({**FLAT, "accuracy": 0.1}, ["raise --lr", "--head-depth 2"]),
        ({**FLAT, "above_chance": 0.5, "spread": 0.01}, ["+0.500", "collapsed", "lower --lr"]),
        ({**FLAT, "without_positives": 0.8, "spread": 0.01}, ["80 %", "--batch-size"]),
        ({"accuracy": 0.101}, ["accuracy 10.1 %", "raise --lr", "--cuts"]),
    ],
    ids=["flat", "flat-with-classifier", "collapsed", "lonely", "guessing"],
)
def test_a_flat_stage_gets_the_advice_that_fits(observed, words):
    advice = advise(2, observed, 10)
    assert all(word in advice for word in words)
