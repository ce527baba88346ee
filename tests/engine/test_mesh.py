import pytest
from hypothesis import given
from hypothesis import strategies as st

from scpl.engine.mesh import Mesh
from scpl.errors import InputError


@given(st.integers(1, 12), st.data())
def test_every_stage_lives_on_one_rank_in_order(num_stages, data):
    num_ranks = data.draw(st.integers(1, num_stages))
    meshes = [Mesh(rank, num_ranks) for rank in range(num_ranks)]
    hosted = [list(mesh.hosted(num_stages)) for mesh in meshes]
    assert sum(hosted, []) == list(range(num_stages))  # noqa: RUF017 - short lists
    sizes = [len(stages) for stages in hosted]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert meshes[0].counts(num_stages) == tuple(sizes)


def test_a_stages_per_rank_can_be_chosen():
    meshes = [Mesh(rank, 3, (1, 3, 2)) for rank in range(3)]
    assert [tuple(mesh.hosted(6)) for mesh in meshes] == [(0,), (1, 2, 3), (4, 5)]


def test_one_process_hosts_everything_and_is_first_and_last():
    mesh = Mesh()
    assert list(mesh.hosted(4)) == [0, 1, 2, 3]
    assert (mesh.is_first, mesh.is_last) == (True, True)
    assert [(m.is_first, m.is_last) for m in (Mesh(0, 2), Mesh(1, 2))] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize(("rank", "num_ranks"), [(1, 1), (-1, 2), (0, 0), (5, 3)])
def test_a_rank_must_be_one_of_the_ranks(rank, num_ranks):
    with pytest.raises(InputError, match=f"Got rank {rank} of {num_ranks}"):
        Mesh(rank, num_ranks)


@pytest.mark.parametrize("stages_per_rank", [(), (1,), (1, 0), (2, 1, 1)])
def test_a_stages_per_rank_must_give_every_rank_a_stage(stages_per_rank):
    with pytest.raises(InputError, match="at least one stage"):
        Mesh(0, 2, stages_per_rank)


def test_the_numbers_are_told_when_stages_and_ranks_do_not_fit():
    with pytest.raises(InputError, match=r"Got 2 stages for 3 ranks.*at most 2 processes"):
        Mesh(0, 3).hosted(2)
    with pytest.raises(InputError, match=r"add up to the 4 stages. Got 1 \+ 2 = 3"):
        Mesh(0, 2, (1, 2)).hosted(4)


def test_the_place_is_read_from_the_launchers_variables(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Mesh.from_env() == Mesh(0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Mesh.from_env([2, 1]) == Mesh(1, 2, (2, 1))


@pytest.mark.parametrize("value", ["one", "", "1.5"])
def test_a_variable_that_is_no_number_is_told(monkeypatch, value):
    monkeypatch.setenv("RANK", value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="RANK"):
        Mesh.from_env()
