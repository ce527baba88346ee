"""Synthetic run folders, as `scpl train` writes them."""

import json
import math

SPEEDS = {"bp": 4000.0, "scpl": 5400.0, "early-exit": 5600.0, "bp-wide": 4900.0, "ddp": 4700.0,
          "gpipe": 3900.0, "1f1b": 4100.0, "bp-cut": 2400.0}  # fmt: skip
ONE_PROCESS = ("bp", "bp-wide")


def make_summary(method="scpl", seed=0, stages=4, **changes):
    speed = SPEEDS.get(method, 3000.0) + 37 * seed
    processes = 1 if method in ONE_PROCESS else 2
    return {
        "method": method,
        "data": "fashion-mnist",
        "model": "vgg8",
        "stages": stages,
        "processes": processes,
        "epochs": 6,
        "seed": seed,
        "test_accuracy": {"bp": 0.921, "scpl": 0.917}.get(method, 0.902) + 0.002 * seed,
        "valid_accuracy": 0.925,
        "samples_per_second": speed,
        "wall_seconds": 6 * 60000 / speed,
        "peak_memory_bytes": [812 * 2**20, 640 * 2**20][:processes],
        "bytes_per_step": [4_194_304, 0] if processes == 2 else [0],
        "wait_share": [0.31, 0.05, 0.02, 0.24][:stages] + [0.1] * (stages - 4),
        "run": f"runs/{method}-{seed}",
        **changes,
    }


def make_metrics(summary, epochs):
    stages, speed = summary["stages"], summary["samples_per_second"]
    columns = ["epoch", "step", "seconds", "train_seconds", "samples_per_second", "lr"]
    columns += [f"train_loss_stage{k}" for k in range(stages)]
    columns += ["valid_loss", "valid_accuracy"]
    columns += [f"valid_accuracy_stage{k}" for k in range(stages)]
    lines = [",".join(columns)]
    for epoch in range(1, epochs + 1):
        seconds = epoch * 60000 / speed
        final = summary["valid_accuracy"] - 0.3 * math.exp(-epoch * (1 + 0.1 * summary["seed"]))
        values = [epoch, 469 * epoch, seconds, seconds * 0.96, speed, 1e-3]
        values += [4.2 - 0.2 * k + 0.8 * math.exp(-epoch / 2) for k in range(stages)]
        values += [0.25, final]
        values += ["" if k == 0 else final - 0.03 * (stages - 1 - k) for k in range(stages)]
        lines.append(",".join(map(str, values)))
    return "\n".join(lines) + "\n"


def make_steps(stages, num_steps):
    lines = []
    for step in range(1, num_steps + 1):
        noise = 0.15 * math.sin(step * 12.9898) * math.cos(step * 78.233)
        losses = [
            {"supervised_contrastive": 4.2 - 0.2 * k + 0.8 * math.exp(-step / 300) + noise}
            for k in range(stages)
        ]
        losses[-1]["cross_entropy"] = 0.25 + 2 * math.exp(-step / 120) + noise / 4
        row = {"step": step, "epoch": 1 + step // 469, "seconds": step / 42, "losses": losses}
        lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"


def make_timeline(stages, num_steps=20, period=0.02):
    events = []
    for step in range(num_steps):
        for stage in range(stages):
            begin = (step + stage) * period
            work = period * (0.95 - 0.12 * (stage % 3))
            spans = [
                ("forward", begin, begin + work / 3),
                ("learn", begin + work / 3, begin + work),
                ("wait", begin + work, begin + period),
            ]
            if stage:
                spans.append(("receive", begin - 0.3 * period, begin))
            events += [
                {
                    "rank": stage // 2,
                    "stage": stage,
                    "step": step,
                    "activity": a,
                    "begin": b,
                    "end": e,
                }
                for a, b, e in spans
            ]
    return events


def make_run(
    folder, method="scpl", seed=0, stages=4, epochs=6, num_steps=900, timeline=True, **changes
):
    """Write a run folder as `scpl train` does."""
    folder.mkdir(parents=True)
    summary = make_summary(method, seed, stages, **changes)
    (folder / "summary.json").write_text(json.dumps(summary))
    config = f'method = "{method}"\nseed = {seed}\n\n[optimizer]\nname = "adamw"\nlr = 1e-3\n'
    (folder / "config.toml").write_text(config)
    environment = {
        "versions": {"python": "3.11.7", "torch": "2.13.0", "scpl": "0.1.0"},
        "hardware": {"cpu": "Example CPU", "cores": 2, "gpus": []},
        "command": f"scpl train --data fashion-mnist --method {method} --seed {seed}",
    }
    (folder / "env.json").write_text(json.dumps(environment))
    (folder / "metrics.csv").write_text(make_metrics(summary, epochs))
    (folder / "steps.jsonl").write_text(make_steps(stages, num_steps))
    if timeline:
        (folder / "timeline.json").write_text(json.dumps(make_timeline(stages)))
    return folder
