import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from networks import NUM_CLASSES, VOCABULARY, seeded, texts
from scpl import SCPL, EarlyExit, Pipeline, heads, models, split
from scpl.errors import InputError, PartitionError
from scpl.models.lstm import LSTMLayer, final_states
from scpl.models.text import Embedding, masked_mean, sinusoids
from scpl.models.transformer import EncoderLayer
from scpl.partition.balance import balanced_cuts

SMALL = {
    "lstm": {"depth": 2, "width": 6, "embedding_size": 5},
    "lstm-handing-over": {"depth": 2, "width": 6, "hand_over": True},
    "transformer": {"depth": 2, "width": 8, "heads": 2, "feed_forward": 12, "dropout": 0.0},
}
EACH_NETWORK = pytest.mark.parametrize("name", SMALL)
LENGTHS = torch.tensor([7, 3, 0, 1, 5])
MASK = torch.arange(7) < LENGTHS[:, None]
TOKENS = torch.randint(1, VOCABULARY, (5, 7), generator=torch.Generator().manual_seed(3)) * MASK


def small(name, **sizes):
    """A small network with seeded weights, without dropout unless asked."""
    sizes = {**SMALL[name], **sizes}
    kind = name.partition("-")[0]
    return seeded(
        lambda: models.build_text(kind, num_classes=NUM_CLASSES, vocab_size=VOCABULARY, **sizes)
    )


def padded(tokens, extra):
    return F.pad(tokens, (0, extra))


def summaries(model, tokens):
    """What the objective of a stage after each layer would see."""
    features, seen = tokens, []
    for name, layer in model.named_children():
        features = layer(features)
        if name not in ("pool", "classifier"):
            seen.append(layer.summarize(features))
    return seen


def count(module):
    return sum(p.numel() for p in module.parameters())


# What they are


def test_the_defaults_are_the_papers_sizes():
    transformer = models.build_text("transformer", num_classes=4, vocab_size=10)
    assert list(transformer._modules) == [
        "embedding", "layer1", "layer2", "layer3", "pool", "classifier",
    ]  # fmt: skip
    assert count(transformer.layer2) == 543_600
    assert transformer.embedding.weight.shape == (10, 300)
    assert count(transformer.classifier) == 300 * 300 + 300 + 4 * 300 + 4
    lstm = models.build_text("lstm", num_classes=4, vocab_size=10)
    assert [count(lstm.get_submodule(f"layer{n}")) for n in (1, 2, 3)] == [
        2 * 4 * 300 * (inputs + 300 + 2) for inputs in (300, 600, 600)
    ]


@EACH_NETWORK
def test_every_parameter_learns(name):
    model = small(name)
    model(TOKENS).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@EACH_NETWORK
def test_the_papers_cuts_and_balanced_ones_give_four_stages(name):
    kind = name.partition("-")[0]
    model = small(name, depth=3)
    readout = models.readout(kind)
    parts = split(model, models.paper_cuts(kind), readout=readout, example=TOKENS)
    assert [len(stage) for stage in parts.names] == [1, 1, 1, 2]
    assert parts.names[0] == ("embedding",)
    width = SMALL[name]["width"]
    assert parts.feature_shapes == ((SMALL[name].get("embedding_size", width),), *[(width,)] * 3)
    assert balanced_cuts(model, 4, readout, TOKENS) == list(models.paper_cuts(kind))


def test_an_lstm_is_balanced_by_its_operations():
    sizes = {"width": 10, "embedding_size": 90, "depth": 4}
    model = models.build_text("lstm", num_classes=3, vocab_size=9, **sizes)
    for tokens in (torch.ones(2, 7, dtype=torch.int64), TOKENS.clamp(max=8)):
        assert balanced_cuts(model, 2, "classifier", tokens) == ["layer2"]
    plain = nn.Sequential(  # the one-kernel path of texts of one length
        *(nn.Sequential(nn.LSTM(i, o), First()) for i, o in ((90, 9), (9, 9), (9, 9), (9, 9))),
        Mean(),
        nn.Linear(9, 3),
    )
    assert balanced_cuts(plain, 2, None, torch.randn(5, 2, 90)) == ["1"]


class First(nn.Module):
    def forward(self, results):
        return results[0]


class Mean(nn.Module):
    def forward(self, features):
        return features.mean(0)


# They are blind to padding and to the other texts of a batch


@EACH_NETWORK
def test_no_number_of_a_text_depends_on_the_batch_it_is_in(name):
    model = small(name).eval()
    with torch.no_grad():
        expected, logits = summaries(model, TOKENS), model(TOKENS)
        for found in (padded(TOKENS, 6), TOKENS.flip(0)):
            back = 1 if found.shape != TOKENS.shape else -1
            rows = torch.arange(5) if back == 1 else torch.arange(5).flip(0)
            torch.testing.assert_close(model(found)[rows], logits, rtol=0, atol=1e-6)
            for one, other in zip(summaries(model, found), expected, strict=True):
                torch.testing.assert_close(one[rows], other, rtol=0, atol=1e-6)
        for row, length in enumerate(LENGTHS.tolist()):
            alone = TOKENS[row : row + 1, :length]
            torch.testing.assert_close(model(alone)[0], logits[row], rtol=0, atol=1e-6)
            for one, other in zip(summaries(model, alone), expected, strict=True):
                torch.testing.assert_close(one[0], other[row], rtol=0, atol=1e-6)
    assert logits.isfinite().all()
    assert len({tuple(row.tolist()) for row in logits}) == 5


@EACH_NETWORK
def test_what_padding_holds_reaches_nothing(name):
    """Every layer is given large numbers at padding."""
    model = small(name).eval()

    class Spoil(nn.Module):
        def forward(self, features):
            hidden, mask, *rest = features
            return hidden.masked_fill(~mask[..., None], 1e6), mask, *rest

    children = dict(model.named_children())
    spoiled = nn.Sequential()
    for key, layer in children.items():
        spoiled.append(layer)
        if key not in ("pool", "classifier"):
            spoiled.append(Spoil())
    with torch.no_grad():
        torch.testing.assert_close(spoiled(TOKENS), model(TOKENS), rtol=0, atol=1e-6)


@EACH_NETWORK
def test_training_does_not_depend_on_padding(name):
    results = []
    for extra in (0, 5):
        model = small(name)
        kind = name.partition("-")[0]
        parts = split(model, models.paper_cuts(kind)[:2], example=TOKENS)
        pipeline = Pipeline(
            parts, SCPL(head=heads.Linear(4)), lambda p: torch.optim.SGD(p, lr=0.05)
        )
        batches = [(padded(tokens, extra), target) for tokens, target in texts()]
        losses = [report.values() for report in pipeline.steps(batches)]
        many = pipeline.predict([padded(tokens, extra) for tokens, _ in batches])
        ones = torch.cat([pipeline.predict(row[None]) for tokens, _ in batches for row in tokens])
        torch.testing.assert_close(many, ones, rtol=0, atol=1e-5)
        results.append((losses, many, model.state_dict()))
    (losses, logits, weights), (other_losses, other_logits, other_weights) = results
    for step, other in zip(losses, other_losses, strict=True):
        assert [list(terms.values()) for terms in step] == [
            pytest.approx(list(terms.values()), abs=1e-5) for terms in other
        ]
    torch.testing.assert_close(logits, other_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(weights, other_weights, rtol=0, atol=1e-5)


def test_the_vector_of_padding_is_zero_and_stays_zero():
    vectors = torch.randn(VOCABULARY, 8)
    model = small("transformer", vectors=vectors)
    assert torch.equal(model.embedding.weight[1:], vectors[1:])
    parts = split(model, ["layer1"], example=TOKENS)
    adam = lambda parameters: torch.optim.AdamW(parameters, lr=0.1)  # noqa: E731
    pipeline = Pipeline(parts, SCPL(), adam)
    for _ in pipeline.steps(texts()):
        pass
    assert not model.embedding.weight[0].any()
    assert not torch.equal(model.embedding.weight[1:], vectors[1:])


def test_a_batch_of_empty_texts_alone_is_no_trouble():
    for name in SMALL:
        logits = small(name).eval()(torch.zeros(3, 0, dtype=torch.int64))
        assert logits.shape == (3, NUM_CLASSES)
        assert logits.isfinite().all()


# They compute what they say


def test_an_embedding_is_a_table_of_normalised_vectors_with_a_mask():
    embedding = Embedding(VOCABULARY, 4)
    hidden, mask = embedding(TOKENS)
    vectors = embedding.weight[TOKENS]
    deviation = (vectors.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(hidden, (vectors - vectors.mean(2, keepdim=True)) / deviation)
    assert 0.01 < embedding.weight[1:].std() < 0.03  # small, so that steps turn it
    assert torch.equal(mask[LENGTHS > 0], MASK[LENGTHS > 0])
    assert mask[2].tolist() == [True] + 6 * [False]  # an empty text reads as one zero vector
    by_hand = [hidden[row, : max(n, 1)].mean(0) for row, n in enumerate(LENGTHS.tolist())]
    torch.testing.assert_close(embedding.summarize((hidden, mask)), torch.stack(by_hand))


@pytest.mark.parametrize("width", [6, 5])
def test_positions_are_sinusoids(width):
    waves = sinusoids(9, width, torch.device("cpu"))
    position = torch.arange(9.0)
    for entry in range(width):
        angle = position / 10_000 ** (2 * (entry // 2) / width)
        wave = angle.cos() if entry % 2 else angle.sin()
        torch.testing.assert_close(waves[:, entry], wave)


def test_an_lstm_layer_reads_each_text_in_both_directions():
    layer = LSTMLayer(4, 3, 0.0, hand_over=False)
    hidden = torch.randn(5, 7, 4)
    mask = torch.arange(7) < LENGTHS.clamp(min=1)[:, None]
    output, _ = layer((hidden, mask))
    for row, length in enumerate(LENGTHS.clamp(min=1).tolist()):
        text = hidden[row, :length]
        ahead, (first, _) = layer.ahead(text)
        back, (second, _) = layer.back(text.flip(0))
        torch.testing.assert_close(output[row, :length], torch.cat([ahead, back.flip(0)], 1))
        final = torch.cat([first, second])
        torch.testing.assert_close(final_states(output, mask)[row], final)
        torch.testing.assert_close(layer.summarize((output, mask))[row], final.mean(0))


def test_an_lstm_layer_is_torchs_bidirectional_one():
    ours, theirs = LSTMLayer(4, 3, 0.0, hand_over=False), nn.LSTM(4, 3, bidirectional=True)
    with torch.no_grad():
        for lstm, suffix in ((ours.ahead, ""), (ours.back, "_reverse")):
            for name, parameter in lstm.named_parameters():
                getattr(theirs, name + suffix).copy_(parameter)
    hidden, lengths = torch.randn(5, 7, 4), LENGTHS.clamp(min=1)
    packed = pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
    expected, _ = pad_packed_sequence(theirs(packed)[0], batch_first=True)
    mask = torch.arange(7) < lengths[:, None]
    found, _ = ours((hidden, mask))
    torch.testing.assert_close(found * mask[..., None], expected)


def test_an_lstm_layer_may_begin_where_the_one_before_ended():
    first, second = (LSTMLayer(size, 3, 0.0, hand_over=True) for size in (4, 6))
    hidden = torch.randn(5, 7, 4)
    mask = torch.arange(7) < LENGTHS.clamp(min=1)[:, None]
    output, _, cell = second(first((hidden, mask)))
    output[mask].sum().backward()
    for layer in (first, second):
        for lstm in (layer.ahead, layer.back):
            assert not lstm.weight_ih_l0.grad[:, -1].any()  # what holds the cell stays
    for row, length in enumerate(LENGTHS.clamp(min=1).tolist()):
        text, states = hidden[row, :length], (None, None)
        for layer in (first, second):
            text = F.pad(text, (0, 1))
            ahead, one = layer.ahead(text, states[0])
            back, other = layer.back(text.flip(0), states[1])
            text, states = torch.cat([ahead, back.flip(0)], 1), (one, other)
        torch.testing.assert_close(output[row, :length], text)
        torch.testing.assert_close(cell[row], torch.cat([state[1] for state in states]))


@pytest.mark.parametrize("positions", [False, True])
def test_an_encoder_layer_is_the_one_of_the_formulas(positions):
    layer = EncoderLayer(8, 2, 12, 0.0, positions=positions)
    given, mask = torch.randn(5, 7, 8), MASK | (torch.arange(7) == 0)
    hidden = given + sinusoids(7, 8, given.device) if positions else given
    normal = layer.norm1(hidden)
    query, key, value = layer.attention.query_key_value(normal).chunk(3, dim=2)
    attended = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = query[..., head] @ key[..., head].transpose(1, 2) / 2.0
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(2)
        attended.append(weights @ value[..., head])
    middle = hidden + layer.attention.output(torch.cat(attended, 2))
    expected = layer.norm3(middle + layer.feed_forward(layer.norm2(middle)))
    found, same_mask = layer((given, mask))
    torch.testing.assert_close(found, expected)
    assert same_mask is mask
    torch.testing.assert_close(layer.summarize((found, mask)), masked_mean(found, mask))


def test_word_order_matters_to_both():
    for name in SMALL:
        model = small(name).eval()
        assert not torch.allclose(model(TOKENS[:1]), model(TOKENS[:1].flip(1)), atol=1e-4)


def test_dropout_drops_only_in_training():
    for name, sizes in SMALL.items():
        model = small(name, **{**sizes, "dropout": 0.5})
        assert torch.equal(model.eval()(TOKENS), model(TOKENS))
        assert not torch.equal(model.train()(TOKENS), model(TOKENS))


# In the engine


@EACH_NETWORK
@pytest.mark.parametrize("head", heads.known())
def test_every_head_compares_one_vector_per_text(name, head):
    model = small(name)
    parts = split(model, num_stages=3, example=TOKENS)
    pipeline = Pipeline(
        parts, SCPL(head=heads.by_name(head)), lambda p: torch.optim.Adam(p, lr=0.01)
    )
    before = copy.deepcopy(model.state_dict())
    losses = [report.values() for _ in range(2) for report in pipeline.steps(texts())]
    assert all(len(step) == 3 for step in losses)
    assert all(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    tokens = torch.cat([F.pad(t, (0, 9 - t.shape[1])) for t, _ in texts()])
    with torch.no_grad():
        assert torch.equal(pipeline.export()(tokens), pipeline.predict(tokens))


@EACH_NETWORK
def test_early_exits_read_texts_after_every_stage(name):
    pipeline = Pipeline(
        split(small(name), num_stages=3, example=TOKENS),
        EarlyExit(),
        lambda p: torch.optim.Adam(p, lr=0.01),
    )
    for _ in range(30):
        for _ in pipeline.steps(texts()):
            pass
    scores = pipeline.evaluate(texts()).result()
    assert len(scores.stage_accuracy) == 3
    assert min(scores.stage_accuracy) > 0.7


@EACH_NETWORK
def test_mixed_precision_trains(name):
    pipeline = Pipeline(
        split(small(name), num_stages=3, example=TOKENS),
        SCPL(),
        lambda p: torch.optim.Adam(p, lr=0.01),
        precision=torch.bfloat16,
    )
    losses = [report.values() for _ in range(20) for report in pipeline.steps(texts())]
    assert losses[-3][2]["cross_entropy"] < losses[0][2]["cross_entropy"]


# Errors


def test_names_are_known():
    assert models.known_text() == ("lstm", "transformer")
    assert not set(models.known()) & set(models.known_text())
    with pytest.raises(InputError, match=r"text model .*lstm.*Got 'ltsm'.*Did you mean 'lstm'"):
        models.build_text("ltsm", num_classes=2, vocab_size=5)
    with pytest.raises(InputError, match=r"small-cnn is for images: choose one of these with"):
        models.build_text("small-cnn", num_classes=2, vocab_size=5)


@pytest.mark.parametrize(
    ("name", "sizes", "told"),
    [
        ("lstm", {"heads": 2}, r"A size of 'lstm' must be one of.*embedding_size.*Got 'heads'"),
        ("transformer", {"widht": 2}, "Did you mean 'width'"),
        ("transformer", {"width": 10, "heads": 4}, r"width=10 and heads=4.*multiple of 4"),
        ("transformer", {"depth": 0}, "depth=0"),
        ("lstm", {"dropout": 1.0}, r"dropout of LSTM.*Got 1\.0"),
        ("lstm", {"vectors": torch.zeros(9, 300)}, r"\[20, 300\].*Got \[9, 300\]"),
    ],
)
def test_sizes_that_cannot_be_are_refused(name, sizes, told):
    with pytest.raises(InputError, match=told):
        models.build_text(name, num_classes=3, vocab_size=VOCABULARY, **sizes)


@pytest.mark.parametrize(("width", "heads"), [(300, 6), (100, 5), (64, 4), (9, 3), (7, 1)])
def test_heads_share_any_width_unless_their_number_is_given(width, heads):
    """300 is the paper's; 50, 100 and 200 are widths of word vectors."""
    model = models.build_text("transformer", num_classes=2, vocab_size=5, width=width)
    assert model.layer1.attention.heads == heads
    assert model(TOKENS.clamp(max=4)).shape == (len(TOKENS), 2)


def test_a_vocabulary_without_words_for_padding_and_unknown_is_refused():
    with pytest.raises(InputError, match=r"padding \(0\).*vocab_size=1"):
        models.build_text("lstm", num_classes=3, vocab_size=1)


def test_the_pool_is_not_a_part_of_the_readout():
    with pytest.raises(
        PartitionError, match=r"The classifier must read.*`summarize`.*make the summary a layer"
    ):
        split(small("lstm"), ["layer1"], readout="pool", example=TOKENS)


def test_cuts_of_each_kind_of_network_are_listed():
    for name in (*models.known(), *models.known_text()):
        assert len(models.paper_cuts(name)) == 3
        assert all(a < b for a, b in pairwise(models.paper_cuts(name)[-2:]))
        assert models.readout(name) == "classifier"
