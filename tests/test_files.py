"""A file is written whole or not at all."""

import os

import pytest

from scpl.files import replacing, write_whole


def test_text_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "grün")
    assert path.read_bytes() == "grün".encode()
    write_whole(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["file"]


def test_what_utf8_lacks_is_escaped(tmp_path):
    write_whole(tmp_path / "file", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "file").read_text("utf-8") == r"caf\udce9"


@pytest.mark.parametrize("durable", [False, True])
def test_an_error_keeps_the_old_file_and_leaves_no_draft(tmp_path, durable):
    path = tmp_path / "file"
    write_whole(path, "old")

    def write_half():
        with replacing(path, durable=durable) as draft:
            draft.write_text("ne")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_reader_never_sees_a_draft_under_the_name(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as draft:
        draft.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"


def test_a_missing_folder_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "file", "text")
