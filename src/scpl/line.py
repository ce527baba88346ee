"""One rank's part of the line: what comes in, who works on it, and how far the run is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from scpl.errors import Interrupted
from scpl.link import Outbox, Receiver
from scpl.message import Kind, Mark, Message
from scpl.worker import Report, Worker

__all__ = ["Line", "Position"]


@dataclass
class Position:
    """Where in the data a run stands.

    Attributes:
        step: Training steps done.
        epoch: Epochs finished.
        batch: Mini-batches of the current epoch done.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0


class Line:
    """Hands messages to the worker, and follows the stream where this rank is not its source.

    Args:
        worker: Runs this rank's stages.
        inbox: Where messages come from; None on the first rank.
        outbox: Where they leave.

    Attributes:
        before_checkpoint: Called when a checkpoint's mark arrives, before the state is saved.
        stopped: Whether the stream has ended.
    """

    def __init__(self, worker: Worker, inbox: Receiver | None, outbox: Outbox) -> None:
        self.worker = worker
        self.position = Position()
        self.before_checkpoint: Callable[[], None] = lambda: None
        self.stopped = False
        self._inbox, self._outbox = inbox, outbox

    def process(self, message: Message) -> None:
        """Do what a message asks, pass it on, and count it."""
        if message.mark is Mark.CHECKPOINT:
            self.before_checkpoint()
        self.worker.handle(message)
        position = self.position
        if message.kind is Kind.TRAIN:
            position.step, position.batch = message.step, position.batch + 1
        elif message.mark is Mark.EPOCH_END:
            position.epoch, position.batch = position.epoch + 1, 0

    def feed(self, message: Message) -> Report | None:
        """Process a message that begins here: the first rank waits for nobody's losses."""
        self.process(message)
        return self.worker.complete(message)

    def follow_epoch(self) -> Iterator[Report]:
        """Work on what is received until an epoch's end mark.

        Raises:
            Interrupted: if the first rank ends the run.
        """
        mark = None
        listening = True
        while mark is not Mark.EPOCH_END:
            message, report = self._next()
            if report is not None and listening:
                try:
                    yield report
                except GeneratorExit:
                    # The caller has seen enough, but what is on its way must be learned.
                    listening = False
            self.process(message)
            mark = message.mark

    def follow_evaluation(self) -> None:
        """Work on what is received until the end mark of an evaluation."""
        mark = None
        while mark is not Mark.EVALUATION_END:
            message, _ = self._next()
            self.process(message)
            mark = message.mark

    def end_epoch(self) -> None:
        """Send the end mark of an epoch down the line."""
        if not self.stopped:
            self.process(Message(Kind.BARRIER, self.position.step, mark=Mark.EPOCH_END))

    def stop(self, reason: str) -> None:
        """End the stream: the last message of all."""
        note = {"last": True, "reason": reason}
        self.stopped = True
        self.worker.handle(Message(Kind.STOP, self.position.step, note=note))

    def close(self) -> None:
        """End the stream, or wait for its end; then wait until everything has left."""
        if self._inbox is None and not self.stopped:
            self.stop("")
        while not self.stopped:
            try:
                message, _ = self._next()
                self.process(message)
            except Interrupted:
                break
        self._outbox.close()

    def _next(self) -> tuple[Message, Report | None]:
        """Receive a message, and the report that it completes.

        Raises:
            Interrupted: at the end of the stream, which ends this rank's part, too.
        """
        assert self._inbox is not None
        message = self._inbox.receive()
        if message.kind is Kind.STOP:
            self.stopped = True
            self.worker.handle(message)
            raise Interrupted("The first rank ended the run", str(message.note.get("reason", "")))
        return message, self.worker.complete(message)
