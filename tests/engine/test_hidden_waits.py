"""Nothing in a training step waits for an accelerator.

The device ``meta`` stands for one that never answers: to look at a value of it fails, as do
operations whose result has a size that depends on values. What is left are looks that are meant:

- the losses of the last 64 steps, and targets that came from the device (`LossGuard`, `Source`);
- the end of an epoch, of an evaluation, and a checkpoint, which look at the same;
- float16, where every step asks whether a gradient overflowed;
- `Report.read`, for whoever calls it.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import scpl
from networks import IMAGE, NUM_CLASSES, UNEVEN_CUTS, VOCABULARY, cnn, images, seeded, texts
from scpl import models
from scpl.engine import transfer
from scpl.engine.messages import EvalBatch, EvaluationBegins, LocalLoss
from scpl.engine.ranks import OneRank
from scpl.engine.scores import Counts, Scores
from scpl.engine.transfer import LOOK_EVERY, numbers, upload
from scpl.engine.worker import Report, read_reports
from scpl.errors import DataError, StageError
from scpl.methods import METHODS
from scpl.methods.base import Method, Objective
from scpl.tasks import Classes

META = torch.device("meta")


class NoCopies(TorchDispatchMode):
    """Copies between the host and the device may wait."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = options or {}
        copies = ("aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::to")
        if operation.name().partition(".")[0] in copies:
            devices = {a.device for a in arguments if isinstance(a, torch.Tensor)}
            devices |= {options["device"]} if options.get("device") is not None else set()
            if len(devices) > 1:
                raise RuntimeError(f"a copy between {devices}")
        return operation(*arguments, **options)


class NoTensorsOfNumbers(TorchFunctionMode):
    """A tensor that is made of Python's numbers is copied to the device, which waits."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        made = function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        if made and (options.get("device") not in (None, "cpu") or function.__name__ != "tensor"):
            raise RuntimeError(f"{function.__name__} on {options.get('device')}")
        return function(*arguments, **options)


@pytest.fixture(autouse=True)
def autocast_on_meta(monkeypatch):
    """Torch has no autocast for the device; that of the CPU leaves its tensors alone."""
    real = torch.autocast

    def autocast(device, **options):
        return real("cpu" if device == "meta" else device, **options)

    monkeypatch.setattr(torch, "autocast", autocast)


def text(name, **sizes):
    return seeded(
        lambda: models.build_text(
            name, num_classes=NUM_CLASSES, vocab_size=VOCABULARY,
            depth=3, width=8, dropout=0.2, **sizes,
        )
    )  # fmt: skip


def image(name):
    return seeded(
        lambda: models.build(
            name, num_classes=NUM_CLASSES, in_channels=IMAGE[0], image_size=IMAGE[1], width=0.1
        )
    )


NETWORKS = {
    "cnn": (cnn, UNEVEN_CUTS, images()),
    "resnet18": (lambda: image("resnet18"), models.paper_cuts("resnet18"), images()[:2]),
    "lstm": (lambda: text("lstm", hand_over=True), models.paper_cuts("lstm"), texts()),
    "transformer": (
        lambda: text("transformer", heads=2, feed_forward=16),
        models.paper_cuts("transformer"),
        texts(),
    ),
}


def pipeline_of(network="cnn", method=None, **options):
    build, cuts, batches = NETWORKS[network]
    parts = scpl.split(build(), before=cuts, example=batches[0][0][:2])
    pipeline = scpl.Pipeline(
        parts,
        method or scpl.SCPL(),
        lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        clip_norm=1.0,
        ranks=OneRank(META),
        **options,
    )
    return pipeline, batches


def step(pipeline, batch, number=1):
    """Train on a batch; only it may be copied to the device."""
    message = pipeline._source.to_train(number, batch)
    with NoCopies(), NoTensorsOfNumbers():
        pipeline._worker.process(message)


def on_device(batches):
    return [(inputs.to(META), target.to(META)) for inputs, target in batches]


LOCAL = [name for name, kind in METHODS.items() if kind.cuts_gradients]


@pytest.mark.parametrize(
    ("network", "method"),
    [
        *(("cnn", method) for method in [*LOCAL, "bp"]),
        *((name, method) for name in NETWORKS if name != "cnn" for method in ("scpl", "al", "bp")),
    ],
)
def test_training_and_evaluation_wait_for_nothing(network, method):
    pipeline, batches = pipeline_of(network, METHODS[method]())
    there = on_device(batches)[0]
    step(pipeline, batches[0])
    step(pipeline, there, 2)
    with NoCopies(), NoTensorsOfNumbers():
        pipeline._worker.process(EvaluationBegins(2))
        pipeline._worker.process(EvalBatch(0, *there))
    assert pipeline._worker.counts.stages[-1]["correct"].device == META


@pytest.mark.parametrize(
    "options",
    [
        {"precision": torch.bfloat16},
        {"precision": scpl.Precision(send_as=torch.bfloat16)},
        {"scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2)},
    ],
)
def test_options_wait_for_nothing(options):
    pipeline, batches = pipeline_of(**options)
    for number in (1, 2):
        step(pipeline, batches[0], number)


WAITS = {
    "item": lambda x: x * x.mean().item(),
    "tolist": lambda x: x * x.mean().tolist(),
    "truth": lambda x: x if x.sum() > 0 else -x,
    "cpu": lambda x: x * x.mean().cpu(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "nonzero": lambda x: x * x.nonzero().shape[0],
    "unique": lambda x: x * x.unique().numel(),
    "equal": lambda x: x * torch.equal(x, x + 1),
    "tensor": lambda x: x * torch.tensor(2.0, device=x.device),
    "upload": lambda x: x * torch.ones(1).to(x.device),
}


@pytest.mark.parametrize("wait", WAITS)
def test_whoever_waits_is_found(wait):
    """The stand-in can tell: these are what one would write without a thought."""

    class Waiting(Objective):
        def forward(self, features, target, carry):
            return {"loss": WAITS[wait](features).mean()}

    class Own(Method):
        name = "own"

        def objective(self, site):
            return Waiting()

    pipeline, batches = pipeline_of(method=Own())
    with pytest.raises(StageError, match="Stage 0"):
        step(pipeline, batches[0])


def test_losses_are_looked_at_every_so_many_steps(monkeypatch):
    assert LOOK_EVERY == 64
    monkeypatch.setattr("scpl.engine.stage.LOOK_EVERY", 3)
    pipeline, batches = pipeline_of("cnn", METHODS["bp"]())
    step(pipeline, batches[0], 1)
    step(pipeline, batches[0], 2)
    with pytest.raises(StageError, match="failed at step 3"):  # the device does not answer
        step(pipeline, batches[0], 3)


class TestTargets:
    """Of an accelerator; here the CPU plays one, so that looks find something."""

    @pytest.fixture(autouse=True)
    def accelerator(self, monkeypatch):
        for place in ("scpl.engine.batches", "scpl.engine.stage"):
            monkeypatch.setattr(f"{place}.answers_at_once", lambda device: False)

    @pytest.fixture
    def trained(self, tmp_path):
        parts = scpl.split(cnn(), before=UNEVEN_CUTS, example=images()[0][0][:2])
        return scpl.Pipeline(
            parts, scpl.SCPL(), lambda p: torch.optim.Adam(p, lr=1e-3), checkpoints=tmp_path
        )

    def bad(self, value=NUM_CLASSES):
        batches = images()
        batches[1][1][3] = value
        return batches

    @pytest.mark.parametrize("value", [-1, NUM_CLASSES])
    def test_no_class_is_an_error_before_the_epoch_ends(self, trained, value):
        with pytest.raises(DataError, match=rf"must lie in 0 \.\. 2\. Got {value} in batch 2"):
            trained.train(self.bad(value))
        assert (trained.epoch, trained.step) == (0, 7)

    def test_no_class_is_an_error_before_anything_is_saved(self, trained, tmp_path):
        def save(report):
            if report.step == 3:
                trained.checkpoint()

        with pytest.raises(DataError, match="in batch 2"):
            trained.train(self.bad(), save)
        assert not list(tmp_path.glob("step-*"))

    def test_no_class_is_an_error_before_a_result(self, trained):
        with pytest.raises(DataError, match="in batch 1"):
            trained.evaluate(self.bad())

    def test_no_class_is_an_error_after_so_many_steps(self, trained, monkeypatch):
        monkeypatch.setattr("scpl.engine.batches.LOOK_EVERY", 5)
        with pytest.raises(DataError, match="Got 3 in batch 2"):
            trained.train(self.bad())
        assert trained.step == 4

    def test_no_layer_sees_what_is_no_class(self, trained):
        """It would break the device for the whole process before anyone could say why."""
        message = trained._source.to_train(1, self.bad(99)[1])
        assert int(message.target.max()) == NUM_CLASSES - 1

    def test_what_is_right_gives_the_same_bits(self, trained):
        trained.train(images())
        plain = scpl.Pipeline(
            scpl.split(cnn(), before=UNEVEN_CUTS, example=images()[0][0][:2]),
            scpl.SCPL(), lambda p: torch.optim.Adam(p, lr=1e-3),
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            for place in ("scpl.engine.batches", "scpl.engine.stage"):
                patch.setattr(f"{place}.answers_at_once", transfer.answers_at_once)
            plain.train(images())
        found, expected = trained.export().state_dict(), plain.export().state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


class Transfers(TorchFunctionMode):
    """Counts what is brought to the host."""

    count = 0

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.count += function is torch.Tensor.cpu
        return function(*arguments, **(options or {}))


def test_many_reports_are_one_transfer():
    def report(step):
        losses = LocalLoss(
            {"a": torch.tensor(step / 3), "b": torch.tensor(2.0)}, {"c": torch.ones(())}
        )
        return Report(step, 4, (losses, LocalLoss()))

    with Transfers() as transfers:
        found = read_reports([report(step) for step in range(1, 300)])
    assert transfers.count == 1
    assert found[3] == ([{"a": float(torch.tensor(4 / 3)), "b": 2.0}, {}], [{"c": 1.0}, {}])
    assert found[3] == report(4).read()
    assert report(4).values() == found[3][0]
    assert read_reports([]) == []
    assert Report(1, 4, ()).read() == ([], [])


def test_an_evaluation_is_one_transfer_for_each_type():
    counts = Counts(5, Classes())
    for stage in (0, 2, 4):
        counts.add(stage, torch.eye(4), torch.tensor([0, 1, 2, 0]), last=stage == 4)
    with Transfers() as transfers:
        result = Scores(counts.stages, 5, OneRank()).result()
    assert transfers.count == 2  # whole numbers and losses
    assert (result.accuracy, result.num_samples) == (0.75, 4)
    assert result.stage_accuracy == (0.75, None, 0.75, None, 0.75)


def test_numbers_keep_every_bit():
    scalars = [torch.tensor(0.1), torch.tensor(2**53 - 1), torch.tensor(0.1, dtype=torch.float64)]
    assert numbers(scalars) == [float(torch.tensor(0.1)), 2**53 - 1, 0.1]
    assert numbers([]) == []


class TestUpload:
    def test_what_is_there_is_not_copied(self):
        tensor = torch.ones(2, 3)
        assert upload(tensor, torch.device("cpu")) is tensor
        assert upload(tensor, torch.device("cpu"), torch.float32) is tensor

    def test_nothing_is_read_before_it_has_arrived(self, monkeypatch):
        """Towards the CPU a copy that does not block may be read too early."""
        seen = []
        monkeypatch.setattr(
            torch.Tensor, "to", lambda self, *a, non_blocking: seen.append(non_blocking)
        )
        upload(torch.ones(1, device=META), torch.device("cpu"))
        upload(torch.ones(1), META)
        assert seen == [False, True]

    @pytest.mark.parametrize("layout", ["plain", "channels last", "with gaps", "pinned"])
    def test_what_goes_to_cuda_is_pinned_first_in_its_own_layout(self, monkeypatch, layout):
        tensor = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
        if layout == "channels last":
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        if layout == "with gaps":
            tensor = tensor[..., ::2]
        pinned, sent = [], []

        def empty_like(like, *, pin_memory):
            assert pin_memory
            pinned.append(torch.empty_strided(like.shape, real(like).stride(), dtype=like.dtype))
            return pinned[-1]

        real = torch.empty_like
        to = torch.Tensor.to

        def record(self, where, **options):
            if isinstance(where, torch.dtype):
                return to(self, where)
            sent.append((self, where, options))
            return self

        monkeypatch.setattr(torch, "empty_like", empty_like)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: layout == "pinned")
        monkeypatch.setattr(torch.Tensor, "to", record)
        upload(tensor, torch.device("cuda"), torch.int64)
        ((found, where, options),) = sent
        assert (where, options) == (torch.device("cuda"), {"non_blocking": True})
        assert torch.equal(found, tensor)
        assert found is (tensor if layout == "pinned" else pinned[0])
        assert found.is_contiguous(memory_format=torch.channels_last) == (layout == "channels last")
