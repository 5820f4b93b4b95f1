"""Which outputs are replaced: models and weight files, whole, and only if they may be."""

from __future__ import annotations

import io
import zipfile

import pytest
import torch
from helpers.tiny_folders import make_folder, make_state

from megatron_bitcpm.arch.layout import Layout
from megatron_bitcpm.cli import main
from megatron_bitcpm.conversion.convert import convert
from megatron_bitcpm.conversion.inspect import inspect
from megatron_bitcpm.conversion.megatron.legacy_writer import write_legacy
from megatron_bitcpm.conversion.megatron.torch_dist_writer import write_torch_dist
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.output_folder import new_file, new_folder
from megatron_bitcpm.data.tokenizer_ids import VOCABULARY_FILES
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import TOKENIZER_FILES

KEPT = "is not a converted model, so it is not replaced"


@pytest.fixture
def folder(tmp_path):
    """A model with every companion that is copied."""
    made = make_folder(tmp_path / "in", minicpm=True)
    for name in {*TOKENIZER_FILES, "bitcpm_tokenizer.json", "chat_template.json"}:
        # An absent vocabulary stays absent: only the first one would count.
        if name not in VOCABULARY_FILES and not (made / name).exists():
            (made / name).write_text("{}")
    (made / "additional_chat_templates").mkdir()
    (made / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    return made


def replace(output, overwrite=True):
    with new_folder(output, overwrite) as scratch:
        (scratch / "new").touch()


def assert_replaced(output):
    replace(output)
    assert [path.name for path in output.iterdir()] == ["new"]


# -- folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("form", ["plain", "latent", "pseudo"])
@pytest.mark.parametrize("limit", [10_000_000, 30_000])
def test_folders_of_this_package_are_replaced(form, weights, limit, folder, tmp_path):
    quantizer = {"quant_type": "ternary", "group_size": -1, "force": True}
    convert(
        folder,
        tmp_path / "out",
        form=form,
        weights=weights,
        max_shard_size=limit,
        **({} if form == "plain" else quantizer),
    )
    assert_replaced(tmp_path / "out")


@pytest.mark.parametrize("write", [write_torch_dist, write_legacy])
def test_checkpoints_of_this_package_are_replaced(write, folder, tmp_path):
    output = tmp_path / "out"
    write(open_source(folder), output, Layout(2))
    (output / "release" / "notes.md").write_text("mine")
    with pytest.raises(CheckpointError, match=rf"{KEPT} \(it holds release/notes.md, which"):
        replace(output)
    (output / "release" / "notes.md").unlink()
    assert_replaced(output)


def test_a_folder_whose_config_was_fixed_is_replaced(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 40', '"vocab_size": 41'))
    inspect(folder, fix_config=True)
    assert (folder / "config.json.bak").exists()
    assert_replaced(folder)


@pytest.mark.parametrize(
    "entry",
    [
        "src/main.py",
        ".git/HEAD",
        "checkpoint-500/model.safetensors",
        "trainer_state.json",
        "iter_0000010/common.pt",
        "latest_checkpointed_iteration.txt",
        "thesis.txt",
        "main.py",
        "package.json",
        "README.md/x",
        "additional_chat_templates/old/x",
    ],
)
def test_a_model_folder_with_something_else_is_kept(entry, folder):
    path = folder / entry
    if path.parent.is_file():
        path.parent.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    named = entry if "templates" in entry else entry.split("/")[0]
    named = named.removesuffix("/x")
    with pytest.raises(CheckpointError, match=rf"{KEPT} \(it holds {named}, which is not part"):
        replace(folder)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_half_a_model_is_kept(name, folder):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{KEPT} \(it has no config.json with weights\)"):
        replace(folder)


def test_a_project_with_a_config_is_kept(folder, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text('{"name": "webapp"}')
    with pytest.raises(CheckpointError, match=KEPT):
        convert(folder, project, form="plain", overwrite=True)
    assert (project / "config.json").read_text() == '{"name": "webapp"}'
    with pytest.raises(CheckpointError, match=rf"{KEPT} \(it is a file\)"):
        convert(folder, project / "config.json", form="plain", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appears_meanwhile_is_kept(overwrite, tmp_path):
    output = tmp_path / "out"
    message = KEPT if overwrite else "exists. Name a new one, or add --overwrite"
    with pytest.raises(CheckpointError, match=message), new_folder(output, overwrite):
        output.mkdir()
        (output / "mine").write_text("x")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["out", "out/mine"]


# -- files -----------------------------------------------------------------------------------------


def torch_file(zipped):
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def zip_file():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("word/document.xml", "thesis")
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["safetensors", "archive", "old"])
def test_files_of_tensors_are_replaced(kind, tmp_path):
    output = tmp_path / "out.bin"
    if kind == "safetensors":
        (make_folder(tmp_path / "in", make_state()) / "model.safetensors").rename(output)
    else:
        output.write_bytes(torch_file(kind == "archive"))
    with new_file(output, True) as scratch:
        scratch.write_text("new")
    assert output.read_text() == "new"


@pytest.mark.parametrize("content", [b"My thesis, chapter one", b"", b"{}" * 20, zip_file()])
def test_other_files_are_kept(content, tmp_path):
    output = tmp_path / "thesis.bin"
    output.write_bytes(content)
    message = "is not a file of tensors, so it is not replaced"
    with pytest.raises(CheckpointError, match=message), new_file(output, True):
        raise AssertionError
    assert output.read_bytes() == content


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    output = tmp_path / "out.bin"
    with pytest.raises(CheckpointError, match="exists"), new_file(output, False) as scratch:
        scratch.write_text("new")
        output.write_bytes(torch_file(True))
    assert output.read_bytes() != b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["out.bin"]


# -- the command -----------------------------------------------------------------------------------


def run(capsys, *arguments):
    """Exit code and messages of a command."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code, capsys.readouterr().err


@pytest.fixture
def pair(tmp_path):
    """Two equal models."""
    return make_folder(tmp_path / "a"), make_folder(tmp_path / "b")


@pytest.mark.parametrize(
    ("place", "rule"),
    [
        ("a/config.json", "would change the input {a}. Name another file."),
        ("b/report.md", "would change the input {b}."),
        ("prompts.md", "would change the input {prompts}."),
        ("mine.txt", "exists and is not a .md file, so it is not replaced. Name another file."),
        ("folder.md", "is a folder. Name a file in it."),
        ("absent/report.md", "there is no folder {absent}. Make it, or name another file."),
        ("mine.txt/report.md", "there is no folder {mine}. Make it"),
        ("/proc/closed.md", "cannot be written: "),
        ("x" * 300, "cannot be written: File name too long. Free space, or name another place."),
    ],
)
def test_where_no_report_goes(place, rule, pair, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "prompts.md").write_text("t1 t2")
    (tmp_path / "folder.md").mkdir()
    paths = {"a": "a", "b": "b", "prompts": "prompts.md", "absent": "absent", "mine": "mine.txt"}
    rule = rule.format(**{name: tmp_path / path for name, path in paths.items()})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if not place.startswith("/proc"):

        def too_late(*unused):
            raise AssertionError

        monkeypatch.setattr("megatron_bitcpm.evaluation.verification.open_source", too_late)
    logits = ("--logits", tmp_path / "prompts.md") if place == "prompts.md" else ()
    code, message = run(capsys, "verify", *pair, "--markdown", tmp_path / place, *logits)
    assert code == 2
    assert message.startswith(f"bitcpm: markdown={tmp_path / place}: {rule}"), message
    assert message.count("\n") == 1
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_an_old_report_is_replaced(pair, tmp_path, capsys):
    (tmp_path / "report.md").write_text("old")
    main_code, message = run(capsys, "verify", *pair, "--markdown", tmp_path / "report.md")
    assert (main_code, message) == (0, "")
    assert "| " in (tmp_path / "report.md").read_text()


def test_what_verify_prints(pair, tmp_path, capsys):
    """A proof is JSON; differences are their table and one line, or that line and a file."""
    state = make_state()
    state["model.norm.weight"][0] += 1
    other = make_folder(tmp_path / "other", state)
    main_code, message = run(capsys, "verify", *pair)
    assert (main_code, message) == (0, "")
    line = f"bitcpm: model={pair[0]}: not the model of {other}: 1 values differ"
    code, message = run(capsys, "verify", pair[0], other)
    assert code == 2
    assert message.startswith("| layer | tensors | differing codes |")
    assert message.splitlines()[-1].startswith(line)
    code, message = run(capsys, "verify", pair[0], other, "--markdown", tmp_path / "report.md")
    assert code == 2
    assert message.startswith(line)
    assert message.count("\n") == 1
    assert "| outside |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "{a}", "--tokenizer", "nowhere"), "tokenizer=nowhere: no such folder."),
        (("inspect", "{a}", "--tokenizer", "nowhere"), "tokenizer=nowhere: no such folder."),
        (("verify", "{a}", "{b}", "--logits-key", "z"), "logits-key=z: has no effect without"),
        (
            ("verify", "{a}", "{b}", "--logits-key", "z", "--logits", "p.txt"),
            "logits-key=z: has no effect on p.txt, which is not a .jsonl file. Leave it out.",
        ),
        (
            ("convert", "--input", "", "--output", "x", "--form", "plain"),
            "input='': must be a path.",
        ),
        (
            ("convert", "--input", "{a}", "--output", "", "--form", "plain"),
            "output='': must be a path.",
        ),
        (
            ("convert", "--input", "{a}", "--output", "{a}-x", "--form", "plain", "--force"),
            "force=True: has no effect: only latents",
        ),
    ],
)
def test_options_without_effect(arguments, message, pair, capsys):
    a, b = pair
    code, found = run(capsys, *(argument.format(a=a, b=b) for argument in arguments))
    assert code == 2
    assert found.startswith(f"bitcpm: {message}")
    assert found.count("\n") == 1
