"""metrics.jsonl, TensorBoard and the plot, read back by their own readers."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
from rich.progress import TimeRemainingColumn

from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.training.metrics import (
    MetricsWriter,
    format_duration,
    plot_losses,
    read_metrics,
)

LAYERS = {
    0: {"zero_fraction": 0.25, "flip_fraction": None},
    11: {"zero_fraction": 0.5, "flip_fraction": math.nan},
}


def lines_of(folder) -> list[dict]:
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_values_of_layers_are_one_nested_key_and_a_tag_each(tmp_path):
    with MetricsWriter(tmp_path, 0, 10, "t") as writer:
        writer.record(5, loss=2.5, grad_norm=None, layers=LAYERS)
        writer.record(6, loss=math.inf)
    assert lines_of(tmp_path) == [
        {
            "iteration": 5,
            "loss": 2.5,
            "layers": {
                "0": {"zero_fraction": 0.25},
                "11": {"zero_fraction": 0.5, "flip_fraction": None},
            },
        },
        {"iteration": 6, "loss": None},
    ]
    found = scalars(tmp_path)
    assert found["layers/00/zero_fraction"] == [(5, 0.25)]
    assert found["layers/11/zero_fraction"] == [(5, 0.5)]
    assert found["loss"] == [(5, 2.5), (6, math.inf)]
    assert "grad_norm" not in found and "layers/00/flip_fraction" not in found


def test_without_tensorboard_the_file_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with MetricsWriter(tmp_path, 0, 10, "t") as writer:
        writer.record(1, loss=1.0, layers=LAYERS)
        writer.rewind(0)
        writer.record(1, loss=3.0)
    assert lines_of(tmp_path) == [{"iteration": 1, "loss": 3.0}]
    assert not (tmp_path / "tensorboard").exists()


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    with MetricsWriter(tmp_path, 0, 10, "t") as writer:
        for step in range(1, 6):
            writer.record(step, loss=float(step))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"iteration": 6, "lo')
    with MetricsWriter(tmp_path, 3, 10, "t") as writer:
        writer.record(4, loss=40.0)
    assert [(m["iteration"], m["loss"]) for m in lines_of(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]
    assert scalars(tmp_path)["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_a_rollback_forgets_what_came_after(tmp_path):
    with MetricsWriter(tmp_path, 0, 10, "t") as writer:
        for step in range(1, 5):
            writer.record(step, loss=float(step))
        writer.rewind(2)
        writer.record(3, loss=30.0)
    assert [(m["iteration"], m["loss"]) for m in lines_of(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert scalars(tmp_path)["loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_cut_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2, "loss')
    assert read_metrics(path) == [{"iteration": 1}]


def drawn_labels(monkeypatch) -> list[str]:
    """Labels of the legend of every figure that is drawn from now on."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    labels = []
    original = pyplot.close

    def reading(figure):
        labels.extend(text.get_text() for text in figure.axes[0].get_legend().get_texts())
        original(figure)

    monkeypatch.setattr(pyplot, "close", reading)
    return labels


def test_the_plot_names_validation_sets(tmp_path, monkeypatch):
    labels = drawn_labels(monkeypatch)
    lines = [
        {"iteration": 1, "loss": 3.0},
        {"iteration": 2, "valid_loss": 3.0, "valid_loss/web": 2.0, "valid_loss/code": 4.0},
        {"iteration": 4, "valid_loss": None, "valid_loss/web": 1.9},
        {"iteration": 4, "loss": None},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert plot_losses({"run": tmp_path}, tmp_path / "a.png", {"bigram": 5.0})
    assert labels == ["run", "run, web", "run, code", "bigram 5.00"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_one_set_and_nothing_else(tmp_path, monkeypatch):
    labels = drawn_labels(monkeypatch)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 2, "valid_loss": 3.0}\n')
    plot_losses({"run": tmp_path}, tmp_path / "a.png")
    assert labels == ["run"]


def test_an_unwritable_plot_is_one_line(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 2, "valid_loss": 3.0}\n')
    with pytest.raises(BitcpmError, match="cannot be written: No such file"):
        plot_losses({"run": tmp_path}, tmp_path / "absent" / "a.png")


@pytest.mark.parametrize("seconds", [0, 59, 3599, 3600, 86_400 + 7261])
def test_durations_look_like_those_of_the_progress_bar(seconds):
    task = SimpleNamespace(total=10, finished=False, time_remaining=float(seconds))
    assert format_duration(seconds) == TimeRemainingColumn().render(task).plain


def test_a_full_disk_loses_numbers_and_not_the_run(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with MetricsWriter(tmp_path, 0, 10, "t") as writer:
        writer.record(1, loss=2.5)
        writer.record(2, loss=2.4)
    assert "numbers are lost (No space left on device)" in caplog.text
