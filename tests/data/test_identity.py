import torch

from scpl.data.identity import Identity, changes, of_samples, shared, short

NAMES = ("cat", "dog")
DIGESTS = torch.tensor([short(bytes([number])) for number in range(6)])
LABELS = torch.tensor([0, 0, 0, 1, 1, 1])


def test_what_the_digest_depends_on():
    """Content, class by name, and order, which decides what a mini-batch holds; nothing else."""
    known = of_samples(DIGESTS, LABELS, NAMES)
    assert (known.count, known.sizes) == (6, {"cat": 3, "dog": 3})
    same = of_samples(DIGESTS, LABELS + 1, ("ant", *NAMES))  # another class comes first
    assert same.digest == known.digest
    moved, other = LABELS.clone(), DIGESTS.clone()
    moved[0], other[0] = 1, 7
    for digests, labels, names in (
        (DIGESTS, moved, NAMES),
        (other, LABELS, NAMES),
        (DIGESTS, LABELS, ("cat", "fox")),
        (DIGESTS.flip(0), LABELS.flip(0), NAMES),
        (DIGESTS[:5], LABELS[:5], NAMES),
    ):
        assert of_samples(digests, labels, names).digest != known.digest


def test_changes_say_which_split_and_in_what():
    one = Identity("a", 60, {"cat": 30, "dog": 30})
    before = {"train": one, "test": one, "valid": one}
    assert changes(before, dict(before), "images") == []
    now = {
        "train": Identity("b", 60, {"cat": 20, "dog": 40}),
        "test": Identity("c", 60, {"cat": 30, "dog": 30}),
    }
    assert changes(before, now, "images") == [
        "train: 60 images, 60 before (cat -10, dog +10)",
        "test: 60 images as before, but others or in another order",
        "valid: is gone",
    ]
    assert changes({"train": one}, {"train": Identity("d", 63, {"cat": 30, "dog": 30, "emu": 3})},
                   "images") == ["train: 63 images, 60 before (emu +3)"]  # fmt: skip
    numbers = Identity("a", 60, {}), Identity("b", 59, {})
    assert changes({"test": numbers[0]}, {"test": numbers[1]}, "texts") == [
        "test: 59 texts, 60 before"
    ]


def test_what_occurs_in_train_as_well_is_counted():
    one, two, few = torch.tensor([1]), torch.tensor([2]), torch.tensor([1, 2, 3])
    found = shared("images", few, validation=None, test=torch.tensor([3, 4, 3, 5]))
    assert list(found) == ["2 of the 4 test images occur in train as well"]
    assert list(shared("images", one, validation=two, test=two)) == []
