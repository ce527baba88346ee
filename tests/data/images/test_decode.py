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
from scpl.data.images.decode import (
    WhiteLevels,
    decode_image,
    decode_images,
    decode_readable,
    white_levels,
)
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
    deep = Image.fromarray(np.full((4, 4), 0xC0FF, np.uint16))
    clear = picture((4, 4)).convert("RGBA")
    palette = picture((4, 4)).quantize(8)
    palette.info["transparency"] = bytes([0, 255])
    bits = picture((4, 4), "L").convert("1")
    images = decode_images([encoded(each) for each in (deep, clear, palette, bits)])
    assert images.shape == (4, 3, 4, 4)
    assert set(images[0].flatten().tolist()) == {0xC0}
    assert torch.equal(images[1], pixels(picture((4, 4))))
    assert set(images[3].flatten().tolist()) <= {0, 255}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_photos_are_turned_as_their_exif_says(kind):
    """A camera that was held upright writes a picture on its side, and how to turn it."""
    lying = np.zeros((8, 16, 3), np.uint8)
    lying[:, :8] = 255  # after a quarter turn to the right this half is on top
    for orientation, bright in {1: "left", 3: "right", 6: "top", 8: "bottom"}.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        image = decode_images([encoded(Image.fromarray(lying), kind, exif=exif)])[0, 0].float()
        height, width = image.shape
        halves = {
            "left": image[:, : width // 2],
            "right": image[:, width // 2 :],
            "top": image[: height // 2],
            "bottom": image[height // 2 :],
        }
        assert (height, width) == ((16, 8) if orientation > 4 else (8, 16))
        assert max(halves, key=lambda half: float(halves[half].mean())) == bright


def test_exif_that_is_damaged_costs_no_image(recwarn):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x03\x01\x12"
    image = picture((8, 4))
    assert torch.equal(decode_images([encoded(image, exif=exif)])[0], pixels(image))


def drawn_in_alpha(mode):
    """A square in the middle of a picture that is black all over."""
    alpha = Image.new("L", (8, 8), 0)
    alpha.paste(255, (2, 2, 6, 6))
    image = Image.new(mode, (8, 8))
    image.putalpha(alpha)
    return image


def test_transparent_images_lie_on_white():
    """A drawing in the alpha channel was a black square."""
    clear, grey = drawn_in_alpha("RGBA"), drawn_in_alpha("LA")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.paste(0, (2, 2, 6, 6))
    palette.info["transparency"] = 1
    key = Image.new("RGB", (8, 8), (9, 9, 9))
    key.paste((0, 0, 0), (2, 2, 6, 6))
    wanted = torch.full((8, 8), 255, dtype=torch.uint8)
    wanted[2:6, 2:6] = 0
    for source in (
        encoded(clear),
        encoded(grey),
        encoded(palette),
        encoded(palette, "GIF", transparency=1),
        encoded(key, transparency=(9, 9, 9)),
        encoded(clear, "WEBP", lossless=True),
        encoded(clear, "TIFF"),
    ):
        assert torch.equal(decode_images([source])[0, 0], wanted)
    assert decode_images([encoded(grey)]).shape[1] == 1
    half = Image.new("RGBA", (4, 4), (0, 100, 200, 128))
    assert decode_images([encoded(half)])[0, :, 0, 0].tolist() == [127, 177, 227]


def test_a_drawing_that_white_hides_is_told():
    white = Image.new("RGBA", (8, 8), "white")
    white.putalpha(drawn_in_alpha("RGBA").getchannel("A"))
    with pytest.warns(ImageWarning, match="1 warning while 2 images .*Nothing shows"):
        decode_images([encoded(white), encoded(drawn_in_alpha("RGBA"))])


@pytest.mark.parametrize(
    ("values", "dtype", "kind", "white", "levels"),
    [
        ([0, 2048, 4095], np.uint16, "PNG", 4095, [0, 128, 255]),  # 12 bits in a file of 16
        ([0, 2000, 3000], np.uint16, "TIFF", 4095, [0, 125, 187]),
        ([0, 512, 1000], np.int32, "TIFF", 1023, [0, 128, 249]),
        ([0, 255, 65535], np.uint16, "PNG", 65535, [0, 1, 255]),
        ([0, 7, 200], np.int32, "TIFF", 255, [0, 7, 200]),
        ([0, 0.5, 1], np.float32, "TIFF", 1.0, [0, 128, 255]),
        ([0, 0.2, 300], np.float32, "TIFF", 1023.0, [0, 0, 75]),
    ],
)
def test_of_deeper_values_the_data_set_says_which_is_white(values, dtype, kind, white, levels):
    """The highest value of one image is the range of all; they were white, or nearly black."""
    sources = [encoded(Image.fromarray(np.full((4, 4), v, dtype)), kind) for v in values]
    found = white_levels(sources)
    assert found == ((white, 1.0) if np.dtype(dtype).kind in "iu" else (255, white))
    assert decode_images(sources)[:, 0, 0, 0].tolist() == levels
    # An image alone is read as among the others, by what a run has kept.
    assert decode_images(sources[1:2], white=found)[0, 0, 0, 0] == levels[1]
    assert decode_image(sources[1], white=found)[0, 0, 0] == levels[1]


def test_values_that_no_range_holds_are_told_with_theirs():
    def tiff(*values):
        return encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")

    sources = [tiff(0, 0.5), tiff(-3, 1), tiff(0, np.nan), tiff(5, 70000)]
    decoded = decode_readable(sources)
    assert decoded.white == (255, 1.0)
    assert list(decoded.unreadable) == [1, 2, 3]
    assert decoded.unreadable[1] == (
        "ValueError: its values, -3.0 .. 1.0, must lie within black, 0, and white, 1.0: scale them"
    )
    deep = encoded(Image.fromarray(np.full((4, 4), 5000, np.uint16)))
    with pytest.raises(DataError, match=r"5,000 .. 5,000, must lie .* white, 4,095"):
        decode_images([deep], white=WhiteLevels(whole=4095))


def test_portable_pixmaps_say_themselves_which_value_is_white():
    assert decode_images([b"P5 1 1 4095 " + struct.pack(">H", 1000)])[0, 0, 0, 0] == 62


def test_colour_of_12_bits_in_16_is_refused_not_black():
    """Pillow reads the upper 8 of the 16 bits: four of them would be left."""

    def photo(value):
        rows = b"".join(b"\0" + struct.pack(">6H", *[value] * 6) for _ in range(2))
        return png(2, 2, 16, 2, rows)

    with pytest.raises(DataError, match="Got up to 4,095 in 2 such images"):
        decode_images([photo(3000), photo(4000)])
    assert decode_images([photo(3000), photo(65535)])[:, 0, 0, 0].tolist() == [11, 255]


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
    with pytest.raises(DataError, match="1 of 2 are not: image 1: UnidentifiedImageError"):
        decode_images([good.read_bytes(), b"junk"])
    with pytest.raises(DataError, match="row 7: "):
        decode_images([b"junk"], name_of=lambda i: f"row {i + 7}")
    with pytest.raises(DataError, match="Got none"):
        decode_images([])


def test_all_unreadable_images_are_told_at_once(tmp_path):
    """One of thousands ended the training, and after it was removed the next."""
    sources = [encoded(picture((4, 4), seed=seed)) for seed in range(40)]
    bad = [0, *range(5, 35)]
    for index in bad:
        sources[index] = sources[index][:50]
    with pytest.raises(DataError, match=r"31 of 40 are not: .*11 more\. .*skip_unreadable") as told:
        decode_images(sources)
    assert [f"image {index}:" in str(told.value) for index in bad] == [True] * 20 + [False] * 11
    decoded = decode_readable(sources)
    assert list(decoded.unreadable) == bad
    kept = [source for index, source in enumerate(sources) if index not in bad]
    assert torch.equal(decoded.images, decode_images(kept))
    none = decode_readable(sources[5:7])
    assert len(none.images) == 0
    assert list(none.unreadable) == [0, 1]


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
            images = torch.arange(self.n * 4).view(self.n, 1, 2, 2).to(torch.uint8)
            return images, "a text about them"

        images, about = remember("images", [self.file], image_size, self.n, make)
        assert torch.equal(images, make()[0])
        assert about == make()[1]
        self.calls -= 1
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


def png(width, height, bits, colour, rows):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def test_how_large_an_image_says_it_is_is_looked_at_before_it_is_decoded():
    """A PNG of 100 kB may stand for gigabytes; of a header that says so, nothing is allocated."""
    bomb = png(12_000, 12_000, 8, 0, b"\0")
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
            ImageWarning, match=r"2 warnings while 2 images .*: Corrupt EXIF data\."
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


def test_libtiff_writes_nothing_to_the_terminal(capfd):
    """It wrote "tempfile.tif: Using code not yet in table", from C."""
    source = encoded(picture((64, 64)), "TIFF", compression="tiff_lzw")
    damaged = [source[:i] + bytes([source[i] ^ 255]) + source[i + 1 :] for i in range(200, 400, 5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode_readable(damaged).unreadable
    assert capfd.readouterr().err == ""
