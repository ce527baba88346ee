"""No file from outside ends in anything but success or an error of ours; see `hostile`.

Many more inputs: benchmarks/faults/fuzz.py.
"""

import random
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile import damaged, targets
from scpl.errors import ScplError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return targets(tmp_path_factory.mktemp("hostile"))


def test_what_is_damaged_is_readable_before(files):
    for target in files:
        target.attempt(target.valid)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), number=st.integers(0, 99))
def test_a_damaged_file_is_an_error_of_ours_or_none(files, seed, number):
    target = files[number % len(files)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.attempt(damaged(target.valid, random.Random(seed)))
        except ScplError:
            pass
        finally:
            target.path.write_bytes(target.valid)
