"""Processes of a benchmark that only pretend to train; imported by them, so it imports little."""

import os
import signal
import sys
import time

from scpl.app.bench.workers import CannotRun, Timing


def serve(scripts, connection, plan):
    """Do what the method's script says: first when getting ready, then in each round.

    A number is a rate in steps per second, a text a reason to fail, ``die`` the end, and ``print``
    prints something.
    """
    script = iter(scripts[plan.train.method.method])

    def act(part, answer):
        if part == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if part == "print":
            sys.stdout.write("something\n")
            sys.stdout.flush()
        elif isinstance(part, str):
            answer = CannotRun(part)
        connection.send(answer)

    act(next(script), ("a", "b", "c"))
    while True:
        connection.recv()
        rate = next(script, 10)
        seconds = 2 / rate if isinstance(rate, int) else 1.0
        act(rate, Timing(seconds, 5, 1, 3, {"wait": 0.25}))


def tell_environment(connection, plan):
    """Send what would decide about torch and ranks."""
    connection.send(())
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
             "OMP_NUM_THREADS")  # fmt: skip
    connection.recv()
    connection.send({name: os.environ[name] for name in names} | {"torch": "torch" in sys.modules})
    connection.recv()


def end_or_hang(connection, plan):
    """The first process ends without a word, the others do nothing more."""
    connection.send(())
    connection.recv()
    if os.environ["RANK"] == "0":
        os._exit(1)
    time.sleep(60)
