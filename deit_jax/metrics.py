"""What a run writes while it trains: a progress bar, JSON lines and TensorBoard."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricWriter:
    """Record a run's metrics from a step on, dropping what an earlier attempt wrote beyond it.

    `metrics.jsonl` holds what follows from the config and the step alone, so that a resumed run
    writes the very file of one that never stopped; `timing.jsonl` holds what depends on the
    machine. Both go to TensorBoard too. Only one process of a run should have an active writer.
    """

    def __init__(self, workdir: Path, start_step: int, total_steps: int, active: bool):
        self._active = active
        if not active:
            return
        from tensorboardX import SummaryWriter

        self._files = {}
        for name in ("metrics", "timing"):
            path = workdir / f"{name}.jsonl"
            kept = [r for r in read_lines(path) if r["step"] <= start_step]
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
            os.replace(temporary, path)
            self._files[name] = path.open("a", buffering=1)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            leave=False,
            disable=None,  # = where stderr is no terminal
        )

    def write(self, step: int, values: dict[str, float], kind: str = "metrics") -> None:
        """Append one record."""
        if not self._active:
            return
        self._files[kind].write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def advance(self, text: str | None = None) -> None:
        """Move the bar by one step."""
        if self._active:
            if text is not None:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._active:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Flush and close everything."""
        if self._active:
            self._bar.close()
            self._board.close()
            for file in self._files.values():
                file.close()


class Meter:
    """Measure images per second and the share of time spent waiting for input."""

    def __init__(self):
        self._start, self._images, self._wait = time.perf_counter(), 0, 0.0

    def waited(self, seconds: float) -> None:
        """Count time that the loop stood still for want of a batch."""
        self._wait += seconds

    def count(self, images: int) -> None:
        """Count images that a finished step used."""
        self._images += images

    def read(self) -> dict[str, float]:
        """Return the rates since the last reading and begin anew."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        rates = {"images_per_second": self._images / elapsed, "input_wait": self._wait / elapsed}
        self.__init__()
        return rates
