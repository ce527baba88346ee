"""One rank: receive, forward, send on, learn."""

import weakref

import pytest
import torch
from torch import nn
from torch.optim import Adam

from networks import NUM_CLASSES, assert_same_state, mlp, rows
from scpl import SCPL, AssociatedLearning, EarlyExit, Pipeline, split
from scpl.engine.messages import Kind, Mark, Message
from scpl.engine.timeline import Timeline
from scpl.engine.worker import Report, Worker
from scpl.errors import StageError
from scpl.partition.values import tensors_of

INPUTS, TARGET = rows()[0]


class Recorder:
    """An outbox that remembers what it was given, as it was then."""

    def __init__(self, watched=()):
        self.sent, self.copies, self.weights = [], [], []
        self.watched = watched

    def send(self, message):
        self.sent.append(message)
        self.copies.append([tensor.clone() for tensor in tensors_of(message.features)])
        self.weights.append([p.detach().clone() for p in self.watched])
        return 8

    def close(self):
        pass


def make(method=None, stages=slice(0, 2)):
    """A worker with some of three stages."""
    parts = split(mlp(), before=["linear1", "linear2"], example=INPUTS)
    pipeline = Pipeline(parts, method or SCPL(NUM_CLASSES), Adam)
    mine = pipeline.stages[stages]
    outbox, saved = Recorder(list(mine[-1].parameters)), []
    worker = Worker(
        mine, outbox, lambda stage, message: saved.append((stage.index, message.step)), Timeline()
    )
    return worker, outbox, saved


def batch(step=1):
    return Message(Kind.TRAIN, step, INPUTS, TARGET)


def test_the_output_leaves_before_the_stage_learns():
    worker, outbox, _ = make()
    before = [p.detach().clone() for p in worker.stages[-1].parameters]
    worker.handle(batch())
    assert_same_state(outbox.weights[0], before)
    assert not all(
        torch.equal(a, b) for a, b in zip(before, worker.stages[-1].parameters, strict=True)
    )


def test_what_was_sent_is_not_changed_by_learning():
    worker, outbox, _ = make()
    for step in range(1, 4):
        worker.handle(batch(step))
    for message, copies in zip(outbox.sent, outbox.copies, strict=True):
        assert_same_state(tensors_of(message.features), copies)
        assert not message.features.requires_grad
        assert message.target is TARGET


def test_only_the_last_stage_of_a_rank_sends():
    worker, outbox, _ = make()
    worker.handle(batch())
    assert [tuple(message.features.shape) for message in outbox.sent] == [(8, 6)]


def test_losses_follow_one_message_late():
    worker, outbox, _ = make()
    reports = []
    for message in (batch(1), batch(2), Message(Kind.BARRIER, 2, mark=Mark.EPOCH_END)):
        reports.append(worker.complete(message))
        worker.handle(message)
    assert reports[0] is None
    assert [(report.step, len(report.losses)) for report in reports[1:]] == [(1, 2), (2, 2)]
    assert outbox.sent[0].reports == ()
    for sent, report in zip(outbox.sent[1:], reports[1:], strict=True):
        again = Report.of(report.step, report.num_samples, sent.reports)
        assert (again.losses, again.observed) == (report.losses, report.observed)
    assert [list(part) for part in reports[1].losses] == [
        ["contrastive", "local_cross_entropy"]
    ] * 2
    assert all("spread" in part for part in reports[1].observed)


def test_the_losses_of_earlier_stages_come_first():
    worker, _, _ = make(stages=slice(2, 3))
    features, earlier = torch.randn(8, 6), {"contrastive": torch.tensor(0.5)}
    worker.handle(Message(Kind.TRAIN, 1, features, TARGET))
    report = worker.complete(Message(Kind.TRAIN, 2, features, TARGET, reports=(earlier, earlier)))
    assert report.values()[:2] == [{"contrastive": 0.5}] * 2
    assert list(report.values()[2]) == ["contrastive", "cross_entropy"]


def test_every_mark_is_passed_on_and_a_checkpoint_saves_each_stage():
    worker, outbox, saved = make()
    for mark in (Mark.EVALUATION_BEGIN, Mark.EVALUATION_END, Mark.CHECKPOINT, Mark.EPOCH_END):
        worker.handle(Message(Kind.BARRIER, 4, mark=mark, note={"x": 1}))
    worker.handle(Message(Kind.STOP, 4))
    assert [m.mark for m in outbox.sent] == [
        Mark.EVALUATION_BEGIN,
        Mark.EVALUATION_END,
        Mark.CHECKPOINT,
        Mark.EPOCH_END,
        None,
    ]
    assert all(m.note == {"x": 1} for m in outbox.sent[:4])
    assert outbox.sent[-1].kind is Kind.STOP
    assert saved == [(0, 4), (1, 4)]


def test_what_objectives_share_travels_with_the_mark_of_an_evaluation():
    worker, outbox, _ = make(AssociatedLearning(NUM_CLASSES, label_features=4))
    decoders = [stage.objective.decoder.state_dict() for stage in worker.stages]
    worker.handle(Message(Kind.BARRIER, 0, mark=Mark.EVALUATION_BEGIN))
    assert_same_state(outbox.sent[-1].carry, [dict(state) for state in decoders])
    for mark in (Mark.EVALUATION_END, Mark.CHECKPOINT, Mark.EPOCH_END):
        worker.handle(Message(Kind.BARRIER, 0, mark=mark))
        assert outbox.sent[-1].carry is None


def test_what_was_shared_is_not_changed_by_learning():
    worker, outbox, _ = make(AssociatedLearning(NUM_CLASSES, label_features=4))
    worker.handle(Message(Kind.BARRIER, 0, mark=Mark.EVALUATION_BEGIN))
    before = [
        {name: value.clone() for name, value in each.items()} for each in outbox.sent[0].carry
    ]
    worker.handle(batch())
    assert_same_state(outbox.sent[0].carry, before)
    assert not torch.equal(worker.stages[0].objective.decoder[0].weight, before[0]["0.weight"])


def test_by_default_what_is_shared_is_passed_on():
    worker, outbox, _ = make(EarlyExit(NUM_CLASSES))
    for carry in (None, [torch.ones(2)]):
        worker.handle(Message(Kind.BARRIER, 0, carry=carry, mark=Mark.EVALUATION_BEGIN))
        assert_same_state(outbox.sent[-1].carry, carry)


def test_an_error_while_sharing_names_the_stage():
    worker, _, _ = make(EarlyExit(NUM_CLASSES))

    def share(received):
        raise KeyError("lost")

    worker.stages[1].objective.share = share
    with pytest.raises(StageError, match=r"Stage 1 \(linear1, relu1\) failed.*KeyError: 'lost'"):
        worker.handle(Message(Kind.BARRIER, 7, mark=Mark.EVALUATION_BEGIN))


def test_an_evaluation_adds_counts_and_trains_nothing():
    worker, outbox, _ = make(EarlyExit(NUM_CLASSES))
    before = [p.detach().clone() for stage in worker.stages for p in stage.parameters]
    worker.handle(Message(Kind.BARRIER, 0, mark=Mark.EVALUATION_BEGIN))
    for index in range(2):
        worker.handle(Message(Kind.EVAL, index, INPUTS, TARGET))
    worker.handle(Message(Kind.BARRIER, 0, mark=Mark.EVALUATION_END))
    counts = outbox.sent[-1].reports
    assert [int(count["count"]) for count in counts] == [16, 16]
    after = [p.detach() for stage in worker.stages for p in stage.parameters]
    assert_same_state(after, before)


class Remembers(nn.Module):
    """Keep weak references to what backward needs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, features):
        output = features.sigmoid()
        self.seen.append(weakref.ref(output))
        return output


def test_activations_are_free_before_the_next_stage_runs():
    alive = []

    class Looks(nn.Module):
        def forward(self, features):
            alive.append(remembers.seen and remembers.seen[-1]() is not None)
            return features

    remembers = Remembers()
    model = nn.Sequential(
        nn.Linear(5, 6), remembers, nn.Linear(6, 6), Looks(), nn.Linear(6, 6), nn.Linear(6, 3)
    )
    parts = split(model, before=["2"], example=INPUTS)
    pipeline = Pipeline(parts, SCPL(NUM_CLASSES), Adam)
    alive.clear()
    assert len(list(pipeline.train(rows()))) == 3
    assert alive == [False] * 3


def test_a_report_reads_all_losses_at_once():
    terms = ({"a": torch.tensor(1.5)}, {}, {"b": torch.tensor(2.0, dtype=torch.float64)})
    assert Report(1, 2, terms).values() == [{"a": 1.5}, {}, {"b": 2.0}]
    assert Report(1, 2, ()).values() == []


@pytest.mark.parametrize("kind", [Kind.TRAIN, Kind.EVAL])
def test_a_failing_stage_stops_the_others(kind):
    worker, outbox, _ = make()
    worker.handle(Message(Kind.BARRIER, 0, mark=Mark.EVALUATION_BEGIN))
    with pytest.raises(RuntimeError, match=r"Stage 0 \(linear0, relu0\) failed at step 3"):
        worker.handle(Message(kind, 3, torch.zeros(8, 99), TARGET))
    assert [m.kind for m in outbox.sent] == [Kind.BARRIER]


def test_a_report_is_read_as_losses_and_observations():
    parts = ({"a": torch.tensor(1.5), "observed:b": torch.tensor(2.0)}, {"c": torch.tensor(3.0)})
    report = Report.of(1, 2, parts)
    assert report.values() == [{"a": 1.5}, {"c": 3.0}]
    assert report.read() == ([{"a": 1.5}, {"c": 3.0}], [{"b": 2.0}, {}])
