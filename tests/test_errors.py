import pickle

import pytest

from scpl import errors
from scpl.errors import InputError, ScplError, StageError, unknown_name

ALL = [getattr(errors, name) for name in errors.__all__ if name != "unknown_name"]
EACH = pytest.mark.parametrize("kind", ALL, ids=[kind.__name__ for kind in ALL])


@EACH
def test_the_three_parts_come_in_order_as_sentences(kind):
    error = kind("Cuts must be sorted", "Got b, a", "Sort them")
    assert str(error) == "Cuts must be sorted. Got b, a. Sort them."
    assert (error.rule, error.got, error.fix) == ("Cuts must be sorted", "Got b, a", "Sort them")


@EACH
def test_an_error_survives_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("Rule", "Got x", "Fix")))
    assert type(error) is kind
    assert str(error) == "Rule. Got x. Fix."


def test_an_interruption_remembers_its_signal_across_processes():
    error = errors.Interrupted("Rule", "Got SIGTERM")
    error.signal = 15
    assert pickle.loads(pickle.dumps(error)).signal == 15


def test_missing_parts_leave_no_gap():
    assert str(ScplError("Rule")) == "Rule."
    assert str(ScplError("Rule", fix="Do it")) == "Rule. Do it."


@pytest.mark.parametrize("end", [".", "?", "!", ":"])
def test_punctuation_is_not_doubled(end):
    assert str(ScplError(f"Rule{end}")) == f"Rule{end}"


def test_bad_input_is_a_value_error_and_user_code_a_runtime_error():
    for name in ("PartitionError", "DataError", "CheckpointError"):
        assert issubclass(getattr(errors, name), InputError)
    assert issubclass(InputError, ValueError)
    assert issubclass(StageError, RuntimeError)
    assert issubclass(errors.NonFiniteError, ArithmeticError)
    assert not issubclass(StageError, InputError)


def test_an_unknown_name_is_answered_with_the_known_ones_closest_first():
    error = unknown_name("method", "early_exit", ["scpl", "bp", "early-exit"])
    assert str(error) == (
        "method must be one of: early-exit, bp, scpl. Got 'early_exit'. Did you mean 'early-exit'?"
    )


def test_a_name_like_none_of_them_gets_no_guess():
    error = unknown_name("method", "zzz", iter(["scpl", "bp"]))
    assert str(error) == "method must be one of: bp, scpl. Got 'zzz'."


def test_advice_replaces_the_guess():
    error = unknown_name("command", "trian", ["train"], "See --help")
    assert str(error).endswith("See --help.")
