"""One rank: receive, forward, send on, learn."""

import weakref

import pytest
import torch
from torch import nn
from torch.optim import Adam

from networks import assert_same_state, mlp, rows
from scpl import SCPL, AssociatedLearning, EarlyExit, Pipeline, split
from scpl.engine.checkpoint import CheckpointWriter
from scpl.engine.messages import (
    CheckpointMark,
    EpochEnds,
    EvalBatch,
    EvaluationBegins,
    EvaluationEnds,
    LocalLoss,
    Stop,
    TrainBatch,
)
from scpl.engine.timeline import Timeline
from scpl.engine.trainers.stream import StreamTrainer
from scpl.engine.worker import Report, Worker
from scpl.errors import Interrupted, StageError
from scpl.partition.values import tensors_of

INPUTS, TARGET = rows()[0]


class Recorder:
    """An outbox that remembers what it was given, as it was then."""

    def __init__(self, watched=()):
        self.sent, self.copies, self.weights = [], [], []
        self.watched = watched

    def send(self, message):
        self.sent.append(message)
        features = getattr(message, "features", None)
        self.copies.append([tensor.clone() for tensor in tensors_of(features)])
        self.weights.append([p.detach().clone() for p in self.watched])
        return 8

    def close(self):
        pass


class Inbox:
    """A channel from the rank before, with what it will bring."""

    def __init__(self, *messages):
        self.waiting = list(messages)

    def receive(self):
        return self.waiting.pop(0)


class Writer(CheckpointWriter):
    """A writer that only remembers."""

    def __init__(self):
        self.saved = []

    def announce(self):
        self.saved.append("begin")

    def write(self, index, mark, state):
        self.saved.append((index, mark.step))


def make(method=None, stages=slice(0, 2), inbox=None, writer=None):
    """A worker with some of three stages, what it sends, and what it reports."""
    parts = split(mlp(), before=["linear1", "linear2"], example=INPUTS)
    pipeline = Pipeline(parts, method or SCPL(), Adam)
    mine = pipeline.stages[stages]
    outbox, reports = Recorder(list(mine[-1].parameters)), []
    worker = Worker(StreamTrainer(mine, outbox, Timeline()), inbox, outbox, writer)
    worker.on_report = reports.append
    worker.stages = mine
    return worker, outbox, reports


def batch(step=1):
    return TrainBatch(step, INPUTS, TARGET)


def test_the_output_leaves_before_the_stage_learns():
    worker, outbox, _ = make()
    before = [p.detach().clone() for p in worker.stages[-1].parameters]
    worker.process(batch())
    assert_same_state(outbox.weights[0], before)
    assert not all(
        torch.equal(a, b) for a, b in zip(before, worker.stages[-1].parameters, strict=True)
    )


def test_what_was_sent_is_not_changed_by_learning():
    worker, outbox, _ = make()
    for step in range(1, 4):
        worker.process(batch(step))
    for message, copies in zip(outbox.sent, outbox.copies, strict=True):
        assert_same_state(tensors_of(message.features), copies)
        assert not message.features.requires_grad
        assert message.target is TARGET


def test_only_the_last_stage_of_a_rank_sends():
    worker, outbox, _ = make()
    worker.process(batch())
    assert [tuple(message.features.shape) for message in outbox.sent] == [(8, 6)]


def test_losses_follow_one_message_late():
    worker, outbox, reports = make(inbox=Inbox())
    known = []
    for message in (batch(1), batch(2), EpochEnds(2)):
        worker.process(message)
        known.append(len(reports))
    assert known == [0, 1, 2], "a step is reported when the next message comes"
    assert [(report.step, len(report.stages)) for report in reports] == [(1, 2), (2, 2)]
    assert [message.losses for message in outbox.sent] == [
        (),
        *(report.stages for report in reports),
    ]
    assert [list(one.terms) for one in reports[0].stages] == [
        ["contrastive", "local_cross_entropy"]
    ] * 2
    assert all("spread" in one.observed for one in reports[0].stages)


def test_the_first_rank_waits_for_nobodys_losses():
    worker, _, reports = make()
    worker.process(batch(1))
    assert [report.step for report in reports] == [1]


def test_a_step_is_reported_before_anything_later_is_done():
    """What is written down of a run must be complete when a checkpoint is made."""
    worker, _, _ = make(inbox=Inbox(), writer=Writer())
    done = []
    worker.on_report = lambda report: done.append(report.step)
    worker._writer.saved = done
    worker.process(batch(1))
    worker.process(batch(2))
    worker.process(CheckpointMark(2, epoch=0, batch=2))
    assert done == [1, 2, "begin", (0, 2), (1, 2)]


def test_the_losses_of_earlier_stages_come_first():
    worker, _, reports = make(stages=slice(2, 3), inbox=Inbox())
    features, earlier = torch.randn(8, 6), LocalLoss({"contrastive": torch.tensor(0.5)})
    worker.process(TrainBatch(1, features, TARGET))
    worker.process(TrainBatch(2, features, TARGET, losses=(earlier, earlier)))
    (report,) = reports
    assert report.values()[:2] == [{"contrastive": 0.5}] * 2
    assert list(report.values()[2]) == ["contrastive", "cross_entropy"]


def test_every_mark_is_passed_on_and_a_checkpoint_saves_each_stage():
    worker, outbox, _ = make(writer=Writer())
    mark = CheckpointMark(4, epoch=1, batch=2, note={"x": 1})
    marks = [EvaluationBegins(4), EvaluationEnds(4), mark, EpochEnds(4), Stop(4, "why")]
    for message in marks:
        worker.process(message)
    assert [type(message) for message in outbox.sent] == [type(message) for message in marks]
    assert outbox.sent[2].note == {"x": 1}
    assert outbox.sent[4].reason == "why"
    assert worker._writer.saved == ["begin", (0, 4), (1, 4)]
    assert worker.stopped


def test_without_a_writer_a_checkpoint_is_only_passed_on():
    worker, outbox, _ = make()
    worker.process(CheckpointMark(4, epoch=1, batch=2))
    assert len(outbox.sent) == 1


def test_a_worker_follows_the_rank_before_until_a_mark():
    inbox = Inbox(batch(1), batch(2), EpochEnds(2), batch(3))
    worker, _, reports = make(inbox=inbox)
    assert sum(1 for _ in worker.follow(EpochEnds)) == 3
    assert [report.step for report in reports] == [1, 2]
    assert vars(worker.position) == {"step": 2, "epoch": 1, "batch": 0}
    assert len(inbox.waiting) == 1


def test_the_end_of_the_stream_interrupts_who_follows():
    worker, outbox, _ = make(inbox=Inbox(batch(1), Stop(1, "enough")))
    with pytest.raises(Interrupted, match=r"The first rank ended the run. enough"):
        list(worker.follow(EpochEnds))
    assert isinstance(outbox.sent[-1], Stop), "later ranks hear of it"
    worker.close()  # which waits for nothing more


def test_what_objectives_share_travels_with_the_mark_of_an_evaluation():
    worker, outbox, _ = make(AssociatedLearning(label_features=4))
    decoders = [stage.objective.decoder.state_dict() for stage in worker.stages]
    worker.process(EvaluationBegins(0))
    assert_same_state(outbox.sent[-1].shared, [dict(state) for state in decoders])


def test_what_was_shared_is_not_changed_by_learning():
    worker, outbox, _ = make(AssociatedLearning(label_features=4))
    worker.process(EvaluationBegins(0))
    before = [
        {name: value.clone() for name, value in each.items()} for each in outbox.sent[0].shared
    ]
    worker.process(batch())
    assert_same_state(outbox.sent[0].shared, before)
    assert not torch.equal(worker.stages[0].objective.decoder[0].weight, before[0]["0.weight"])


def test_by_default_what_is_shared_is_passed_on():
    worker, outbox, _ = make(EarlyExit())
    for shared in (None, [torch.ones(2)]):
        worker.process(EvaluationBegins(0, shared=shared))
        assert_same_state(outbox.sent[-1].shared, shared)


def test_an_error_while_sharing_names_the_stage():
    worker, _, _ = make(EarlyExit())

    def share(received):
        raise KeyError("lost")

    worker.stages[1].objective.share = share
    with pytest.raises(StageError, match=r"Stage 1 \(linear1, relu1\) failed.*KeyError: 'lost'"):
        worker.process(EvaluationBegins(7))


def test_an_evaluation_adds_counts_and_trains_nothing():
    worker, outbox, _ = make(EarlyExit())
    before = [p.detach().clone() for stage in worker.stages for p in stage.parameters]
    worker.process(EvaluationBegins(0))
    for index in range(2):
        worker.process(EvalBatch(index, INPUTS, TARGET))
    worker.process(EvaluationEnds(0))
    counts = outbox.sent[-1].counts
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
    pipeline = Pipeline(parts, SCPL(), Adam)
    alive.clear()
    assert len(list(pipeline.steps(rows()))) == 3
    assert alive == [False] * 3


def test_a_report_reads_all_losses_at_once():
    terms = ({"a": torch.tensor(1.5)}, {}, {"b": torch.tensor(2.0, dtype=torch.float64)})
    assert Report(1, 2, tuple(map(LocalLoss, terms))).values() == [{"a": 1.5}, {}, {"b": 2.0}]
    assert Report(1, 2, ()).values() == []


@pytest.mark.parametrize("kind", [TrainBatch, EvalBatch])
def test_a_failing_stage_stops_the_others(kind):
    worker, outbox, _ = make()
    worker.process(EvaluationBegins(0))
    with pytest.raises(RuntimeError, match=r"Stage 0 \(linear0, relu0\) failed at step 3"):
        worker.process(kind(3, torch.zeros(8, 99), TARGET))
    assert [type(message) for message in outbox.sent] == [EvaluationBegins]


def test_a_report_is_read_as_losses_and_observations():
    first = LocalLoss({"a": torch.tensor(1.5)}, {"b": torch.tensor(2.0)})
    report = Report(1, 2, (first, LocalLoss({"c": torch.tensor(3.0)})))
    assert report.values() == [{"a": 1.5}, {"c": 3.0}]
    assert report.read() == ([{"a": 1.5}, {"c": 3.0}], [{"b": 2.0}, {}])
