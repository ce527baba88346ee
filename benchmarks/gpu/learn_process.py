"""A process that does a job of learn.py, as its parent sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("learn_run.py")


@dataclass
class Worker:
    """A process at work.

    Attributes:
        what: For messages.
        process: The process.
        log: What it says; deleted if all goes well.
    """

    what: str
    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, what: str, log: Path, arguments: dict[str, Any]) -> Worker:
        """Start a process that does what it is told by its one argument."""
        command = [sys.executable, str(SCRIPT), json.dumps(arguments)]
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        return cls(what, process, log)

    def succeeded(self) -> bool:
        """Whether it ended well; else say why not."""
        status = self.process.wait()
        text = self.log.read_text(encoding="utf-8", errors="replace").strip()
        if status == 0:
            self.log.unlink()
            return True
        last = text.splitlines()[-1] if text else "it said nothing"
        say(f"{self.what} failed with status {status}: {last} (all of it: {self.log})")
        return False

    def end(self) -> None:
        """End it now, if it has not ended."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
            self.process.kill()
        self.process.wait()


def say(line: str) -> None:
    """Tell people how far it is."""
    print(line, file=sys.stderr, flush=True)
