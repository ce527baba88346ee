import logging
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data_files import encoded, picture
from scpl.data.cache import remember
from scpl.data.images import decode
from scpl.data.images.decode import decode_images
from scpl.errors import DataError, ImageWarning, InputError


def pixels(image):
    array = np.asarray(image)
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def test_colour_and_grey_images_become_one_tensor():
    colour, grey = picture((6, 4)), picture((6, 4), "L")
    images = decode_images([encoded(grey), encoded(colour)])
    assert images.shape == (2, 3, 4, 6)
    assert images.is_contiguous()
    assert torch.equal(images[1], pixels(colour))
    assert torch.equal(images[0], pixels(grey).expand(3, -1, -1))
    assert decode_images([encoded(grey)]).shape == (1, 1, 4, 6)


def test_unusual_modes_are_converted():
    deep = Image.fromarray(np.full((4, 4), 0x12FF, np.uint16))
    clear = picture((4, 4)).convert("RGBA")
    palette = picture((4, 4)).quantize(8)
    palette.info["transparency"] = bytes([0, 255])
    bits = picture((4, 4), "L").convert("1")
    images = decode_images([encoded(each) for each in (deep, clear, palette, bits)])
    assert images.shape == (4, 3, 4, 4)
    assert set(images[0].flatten().tolist()) == {0x12}
    assert torch.equal(images[1], pixels(picture((4, 4))))
    assert set(images[3].flatten().tolist()) <= {0, 255}


def test_sizes_that_differ_need_a_size(tmp_path):
    picture((8, 8)).save(tmp_path / "a.png")
    picture((8, 6)).save(tmp_path / "b.png")
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    with pytest.raises(DataError, match=r"a\.png with 8 x 8 .*b\.png with 8 x 6.*image_size"):
        decode_images(paths)
    assert decode_images(paths, 4).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("size", [(30, 10), (10, 30), (7, 33), (10, 10), (3, 5)])
def test_the_shorter_side_is_fitted_and_the_centre_kept(size):
    width, height = size
    ramp = np.linspace(0, 250, max(size)).astype(np.uint8)
    ramp = np.tile(ramp, (height, 1)) if width >= height else np.tile(ramp, (width, 1)).T
    image = decode_images([encoded(Image.fromarray(ramp.copy()))], 10)
    assert image.shape == (1, 1, 10, 10)
    assert float(image.float().mean()) == pytest.approx(125, abs=12)


def test_an_unreadable_image_is_named(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    picture().save(good)
    bad.write_bytes(good.read_bytes()[:60])
    with pytest.raises(DataError, match=r"bad\.png"):
        decode_images([good, bad])
    with pytest.raises(DataError, match=r"missing\.png: FileNotFoundError"):
        decode_images([tmp_path / "missing.png"])
    with pytest.raises(DataError, match="Got image 1: UnidentifiedImageError"):
        decode_images([good.read_bytes(), b"junk"])
    with pytest.raises(DataError, match="Got row 7: "):
        decode_images([b"junk"], name_of=lambda i: f"row {i + 7}")
    with pytest.raises(DataError, match="Got none"):
        decode_images([])


def test_threads_decode_the_same_and_pass_errors_on(monkeypatch):
    sources = [encoded(picture((4, 4), seed=seed)) for seed in range(600)]
    alone = decode_images(sources)
    monkeypatch.setattr(decode, "_SMALL_BYTES", 0)
    assert torch.equal(decode_images(sources), alone)
    with pytest.raises(DataError, match="image 599"):
        decode_images([*sources[:-1], b"junk"])


def test_missing_pillow_is_explained(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(InputError, match=r"'PIL'.*pip install 'scpl\[images\]'"):
        decode_images([b""])


class Source:
    """Counts how often the images are made."""

    def __init__(self, file, n=5000):
        self.calls, self.file, self.n = 0, file, n
        file.write_bytes(b"source")

    def __call__(self, image_size=None):
        def make():
            self.calls += 1
            return torch.arange(self.n * 4).view(self.n, 1, 2, 2).to(torch.uint8)

        images = remember("images", [self.file], image_size, self.n, make)
        assert torch.equal(images, make())
        self.calls -= 1
        return self.calls


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCPL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_decoded_images_are_kept_until_the_source_changes(tmp_path, cache):
    source = Source(tmp_path / "source")
    assert [source(), source(), source(image_size=2), source(image_size=2)] == [1, 1, 2, 2]
    source.file.write_bytes(b"changed")
    assert source() == 3
    assert {path.suffix for path in cache.iterdir()} == {".safetensors"}


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "junk"])
def test_a_damaged_cache_is_made_again(tmp_path, cache, damage):
    source = Source(tmp_path / "source")
    source()
    (file,) = cache.iterdir()
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(
        {"truncate": data[:-40], "flip": data, "empty": b"", "junk": b"x" * 200}[damage]
    )
    assert source() == 2
    assert source() == 2


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    source = Source(tmp_path / "source")
    monkeypatch.setenv("SCPL_CACHE", str(tmp_path / "file" / "cache"))
    assert [source(), source()] == [1, 2]
    monkeypatch.setenv("SCPL_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_: (_ for _ in ()).throw(OSError))
    assert source() == 3
    assert list((tmp_path / "full").iterdir()) == []


def test_the_cache_can_be_off_and_spares_small_sets(tmp_path, cache, monkeypatch):
    small = Source(tmp_path / "small", n=10)
    assert [small(), small()] == [1, 2]
    monkeypatch.setenv("SCPL_CACHE", "off")
    large = Source(tmp_path / "large")
    assert [large(), large()] == [1, 2]
    assert not cache.exists()


def test_only_decoders_of_images_are_asked(tmp_path, monkeypatch):
    """A PostScript file called innocent.png made Pillow start Ghostscript: it looks at contents."""
    from PIL import EpsImagePlugin

    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a))
    file = tmp_path / "innocent.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with Image.open(file) as image:
        assert image.format == "EPS"  # which this test would be nothing without
    with pytest.raises(DataError, match=r"innocent\.png: UnidentifiedImageError"):
        decode_images([file])
    assert not started


def test_every_ending_that_is_looked_for_has_a_decoder():
    Image.init()
    assert {Image.EXTENSION[end] for end in decode.EXTENSIONS} == set(decode.FORMATS)


def test_how_large_an_image_says_it_is_is_looked_at_before_it_is_decoded():
    """A PNG of 100 kB may stand for gigabytes; of a header that says so, nothing is allocated."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))
    with pytest.raises(DataError, match="12000 x 12000 pixels are more than 67,108,864"):
        decode_images([bomb])


def test_a_long_and_narrow_image_is_not_enlarged_to_gigabytes():
    with pytest.raises(DataError, match="pixels are more than"):
        decode_images([encoded(picture((2000, 1), "L"))], 1000)


def test_images_that_have_no_room_are_refused_at_once():
    with pytest.raises(DataError, match="Got 1 x 3 x 1000000 x 1000000 bytes, 3,000 of"):
        decode.check_room(1, 3, 1_000_000, 1_000_000)


def test_doubts_of_the_decoder_are_counted_not_shown_one_by_one():
    """Pillow's own warnings came to the terminal raw, one for each image."""
    source = encoded(picture((4, 4)))

    def doubtful(*_):
        warnings.warn("Corrupt EXIF data.\n Expecting to read 4 bytes", stacklevel=2)
        return plain(*_)

    plain = decode._plain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_plain", doubtful)
        with pytest.warns(
            ImageWarning, match=r"3 warnings on 2 images .*: Corrupt EXIF data\."
        ) as told:
            decode_images([source, source])
    assert len(told) == 1


def test_what_pillow_logs_of_a_damaged_image_stays_off_the_terminal(capfd):
    """Without a handler, logging writes errors to the terminal raw."""
    source = bytearray(encoded(picture(), "TIFF"))
    place = source.index(struct.pack("<HHII", 277, 3, 1, 3))  # samples per pixel
    source[place + 8 : place + 12] = struct.pack("<I", 2048)
    root = logging.getLogger()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(root, "handlers", [])  # as without pytest
        with pytest.raises(DataError, match="must be readable"):
            decode_images([bytes(source)])
    assert capfd.readouterr().err == ""
