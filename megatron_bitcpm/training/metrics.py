"""Where a run's numbers go: the terminal, ``metrics.jsonl``, TensorBoard, ``loss.png``."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn

from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.progress import Progress
from megatron_bitcpm.publish import Output, write_text

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes the metrics of a run, of which `first_iter` steps are done; a context manager."""

    def __init__(self, directory: Path, first_iter: int, train_iters: int, title: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / METRICS_FILE
        self._open_files(first_iter)
        columns = (MofNCompleteColumn(), "eta")
        self._progress = Progress(title, train_iters, *columns, completed=first_iter)

    def __enter__(self) -> MetricsWriter:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        with self._tolerating_a_full_disk():
            self._close_files()

    def say(self, text: str) -> None:
        """Print text above the progress bar."""
        self._progress.say(text)

    def advance(self, iteration: int) -> None:
        """Move the progress bar."""
        self._progress.update(iteration)

    def record(
        self,
        iteration: int,
        layers: dict[int, dict[str, float | None]] | None = None,
        **values: Any,
    ) -> None:
        """Write the values of one moment by metric name, those of layers by layer number.

        None values are left out; one that is not finite becomes null in the file.
        """
        kept = {key: value for key, value in values.items() if value is not None}
        line: dict[str, Any] = _finite_or_null(kept)
        for number, of_layer in (layers or {}).items():
            found = {key: value for key, value in of_layer.items() if value is not None}
            line.setdefault("layers", {})[str(number)] = _finite_or_null(found)
            kept.update({f"layers/{number:02d}/{key}": value for key, value in found.items()})
        with self._tolerating_a_full_disk():
            self._stream.write(json.dumps({"iteration": iteration, **line}) + "\n")
            self._stream.flush()
            if self._tensorboard is not None:
                for key, value in kept.items():
                    self._tensorboard.add_scalar(key, value, iteration)

    def rewind(self, iteration: int) -> None:
        """Forget what was recorded after an iteration, to which the run returned."""
        with self._tolerating_a_full_disk():
            self._close_files()
            self._open_files(iteration)
        self.advance(iteration)

    def _open_files(self, iteration: int) -> None:
        # A run resumed from an earlier checkpoint will write the later lines again.
        if self._path.is_file():
            lines = [line for line in read_metrics(self._path) if line["iteration"] <= iteration]
            text = "".join(json.dumps(line) + "\n" for line in (lines if iteration else []))
            write_text(self._path, text)
        self._stream = self._path.open("a", encoding="utf-8")
        self._tensorboard = _open_tensorboard(self._path.parent / "tensorboard", iteration)

    def _close_files(self) -> None:
        self._stream.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    @contextmanager
    def _tolerating_a_full_disk(self) -> Iterator[None]:
        """Lose numbers rather than the run: only this rank knows, and the others continue."""
        try:
            yield
        except OSError as error:
            logger.warning("%s: numbers are lost (%s)", self._path, error.strerror or error)


def _finite_or_null(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``; a last line cut short by a crash is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            if not isinstance(values["iteration"], int):
                raise TypeError("iteration")
            lines.append(values)
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: unreadable line dropped", path)
    return lines


def _open_tensorboard(directory: Path, first_iter: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("tensorboard is not installed: no event files (pip install tensorboard)")
        return None
    return SummaryWriter(str(directory), purge_step=first_iter + 1 if first_iter else 0)


def plot_losses(
    runs: dict[str, Path], output: Path, levels: dict[str, float] | None = None
) -> bool:
    """Draw losses of run folders by label as a PNG; return False without matplotlib.

    `levels` are losses in nats of models without a run, drawn as horizontal lines.
    """
    try:
        import matplotlib
    except ImportError:
        logger.info("matplotlib is not installed: no %s (pip install matplotlib)", output.name)
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=110)
    for index, (label, directory) in enumerate(runs.items()):
        _draw_run(axes, label, f"C{index}", read_metrics(directory / METRICS_FILE))
    for index, (label, value) in enumerate((levels or {}).items()):
        dash = ("--", ":")[index % 2]
        axes.axhline(value, label=f"{label} {value:.2f}", color="0.4", linestyle=dash)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token (pale: training, dots: validation)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:  # a run stopped before its first validation has none
        axes.legend()
    figure.tight_layout()
    # Without a suffix matplotlib would add one.
    place = Path(os.path.realpath(output if output.suffix else f"{output}.png"))
    try:
        with Output(place, True, "plot", BitcpmError, make_parents=False).new_file() as scratch:
            figure.savefig(scratch)
    finally:
        pyplot.close(figure)
    return True


def _draw_run(axes: Any, label: str, color: str, lines: list[dict[str, Any]]) -> None:
    """Draw one run; of several validation sets each is a broken line beside their mean."""

    def draw(key: str, **style: Any) -> None:
        points = [(m["iteration"], m[key]) for m in lines if m.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, **style)

    draw("loss", alpha=0.35, linewidth=1)
    draw("valid_loss", marker="o", markersize=3, label=label)
    sets = {key: None for line in lines for key in line if key.startswith("valid_loss/")}
    for key, dash in zip(sets, itertools.cycle(("--", ":", "-."))):
        name = key.removeprefix("valid_loss/")
        draw(key, linestyle=dash, linewidth=1, label=f"{label}, {name}")


def format_duration(seconds: float) -> str:
    """Return ``hours:minutes:seconds``, the progress bar's form; hours may exceed a day."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
