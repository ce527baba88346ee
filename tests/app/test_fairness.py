import pytest

from scpl.app.bench.bench import config_for
from scpl.app.commands import method_names
from scpl.app.config import TrainConfig
from scpl.errors import InputError
from scpl.methods import METHODS

SEVERAL = TrainConfig.of(processes=2, stages_per_process=(3, 1), threads=2)


@pytest.mark.parametrize(
    ("method", "processes", "hosted", "threads"),
    [
        ("scpl", 2, (3, 1), 2),
        ("early-exit", 2, (3, 1), 2),
        ("gpipe", 2, (3, 1), 2),
        ("bp-cut", 2, (3, 1), 2),
        ("ddp", 2, (), 2),
        ("bp", 1, (), 2),
        ("bp-wide", 1, (), 4),
    ],
)
def test_processes_and_threads_of_each_method(method, processes, hosted, threads):
    """One process has the threads of one of the others, or of all of them together."""
    own = config_for(SEVERAL, method)
    assert own == SEVERAL.changed(
        method=method, processes=processes, stages_per_process=hosted, threads=threads
    )


def test_in_one_process_all_have_the_same():
    for method in ("scpl", "bp", "bp-wide", "ddp"):
        expected = TrainConfig.of(threads=3, method=method)
        assert config_for(TrainConfig.of(threads=3), method) == expected


def test_each_method_gets_the_options_that_it_has():
    base = TrainConfig.of(temperature=0.2, micro_batches=2, cross_entropy=0.5)
    assert config_for(base, "gpipe").method.options == {"micro_batches": 2}
    assert config_for(base, "dascpl").method.options == {"temperature": 0.2}
    assert config_for(base, "bp").method.options == {}


def test_cores_are_divided_where_no_threads_are_given(monkeypatch):
    monkeypatch.setattr("scpl.app.bench.bench.share_of_cores", lambda processes: 8 // processes)
    two = SEVERAL.changed(threads=None)
    assert config_for(two, "bp").run.threads == 4
    assert config_for(two, "bp-wide").run.threads == 8


def test_all_methods():
    assert method_names(" all ") == list(METHODS)


def test_methods_are_known_and_different():
    assert method_names("scpl, bp") == ["scpl", "bp"]
    for wrong, why in [("", "different"), ("bp,bp", "different"), ("bp,scp", "one of: scpl")]:
        with pytest.raises(InputError, match=why):
            method_names(wrong)
