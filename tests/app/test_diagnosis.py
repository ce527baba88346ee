import pytest

from scpl.app.config import TrainConfig
from scpl.app.train.recorder import advise, is_flat
from scpl.tasks import Classes

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
    assert not is_flat(observed, Classes(), 10)


@pytest.mark.parametrize(
    ("settings", "observed", "words"),
    [
        ({}, FLAT, ["Stage 2", "contrast -0.001", "raise --lr", "--cross-entropy 0.8"]),
        ({}, {**FLAT, "accuracy": 0.1}, ["raise --lr", "--head-depth 2"]),
        ({"method": "dascpl"}, {**FLAT, "accuracy": 0.1}, ["raise --lr", "--head-depth 2"]),
        ({}, {**FLAT, "above_chance": 0.5, "spread": 0.01}, ["+0.500", "collapsed", "lower --lr"]),
        (
            {},
            {**FLAT, "without_positives": 0.8, "spread": 0.01},
            ["80 %", "--batch-size", "--views 2"],
        ),
        ({"method": "early-exit"}, {"accuracy": 0.101}, ["10.1 %", "raise --lr", "--cuts"]),
    ],
    ids=["flat", "flat-with-classifier", "dascpl", "collapsed", "lonely", "guessing"],
)
def test_a_flat_stage_gets_the_advice_that_fits(settings, observed, words):
    assert is_flat(observed, Classes(), 10)
    advice = advise(2, observed, TrainConfig.of(**settings))
    assert all(word in advice for word in words)
    assert "`" not in advice


def test_advice_names_only_what_texts_can_use():
    lonely = {**FLAT, "without_positives": 0.8}
    assert "--views" not in advise(0, lonely, TrainConfig.of(data="imdb", model="lstm"))
