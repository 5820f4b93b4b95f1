"""Fine-tuning a latent folder with the HF Trainer stays on the grid; what it saves converts."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from helpers.model_factory import MUP, TIED, tiny_model
from helpers.modeling_folders import (  # noqa: F401
    VOCAB,
    load,
    make_tensors,
    modules_cache,
    quantizer,
    weights_of_forward,
    write_folder,
)
from safetensors.torch import load_file

from megatron_bitcpm.arch.tensors import find_projection
from megatron_bitcpm.conversion.hf.modeling.writer import trusted_modeling_files
from megatron_bitcpm.conversion.open import open_source

pytestmark = pytest.mark.both_transformers

LENGTH = 32


class Sentences(torch.utils.data.Dataset):
    """Counting upwards from a random id, in steps that depend on it."""

    def __init__(self):
        starts = torch.randint(VOCAB, (64,), generator=torch.Generator().manual_seed(0))
        steps = torch.arange(LENGTH)
        self.rows = [(start + (1 + start % 3) * steps) % VOCAB for start in starts]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def fine_tune(folder, output, dtype, steps, **arguments):
    """Train; return the model and the losses of its steps."""
    from transformers import Trainer, TrainingArguments

    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = load(folder, dtype=dtype)
    settings = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=Sentences())
    trainer.train()
    trainer.save_model(str(output / "saved"))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return model, losses


def count_values(wq, weights_per_scale):
    """The largest number of different magnitudes in a group, zeros apart."""
    groups = wq.reshape(-1, weights_per_scale).abs()
    return max(len(set(group[group > 0].tolist())) for group in groups)


CASES = {
    "fp32": (torch.float32, {}, {}, quantizer(group_size=16)),
    "bf16": (torch.bfloat16, {}, TIED, quantizer(2)),
    "autocast": (torch.float32, {"bf16": True}, MUP | TIED, quantizer(group_size=32)),
    "checkpointing": (
        torch.float32,
        {"gradient_checkpointing": True},
        MUP,
        quantizer(2, group_size="tensor", activation="int8_per_token"),
    ),
}


SLOW = ("fp32", "autocast", "checkpointing")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES]
)
def test_fine_tuning_learns_on_the_grid(name, tmp_path, monkeypatch):
    dtype, arguments, changes, stamp = CASES[name]
    architecture = tiny_model("modeling", **changes)
    before = make_tensors(architecture, dtype)
    folder = write_folder(tmp_path / "folder", architecture, "latent", stamp, before)
    model, losses = fine_tune(folder, tmp_path / "out", dtype, 16, **arguments)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), losses

    saved = tmp_path / "out" / "saved"
    assert trusted_modeling_files(saved)
    source = open_source(saved)
    assert (source.form, source.model, source.vocab_size) == ("latent", architecture, VOCAB)
    # The version in a stamp is that of its writer.
    assert source.quantizer == stamp
    weights = weights_of_forward(model, torch.arange(8)[None], monkeypatch)
    quantized = source.quantized_tensors()
    assert len(quantized) == 14
    changed = 0
    for tensor_name, weights_per_scale in quantized.items():
        used = weights[tensor_name]
        assert used.dtype == dtype and count_values(used, weights_per_scale) == 1
        assert torch.equal(source.forward_tensor(tensor_name), used), tensor_name
        changed += not torch.equal(source.tensor(tensor_name), before[tensor_name])
    assert changed == 14


def test_saved_latents_convert_to_the_codes_of_the_trained_forward(tmp_path, monkeypatch):
    from megatron_bitcpm.conversion.qat_convert import qat_convert

    architecture, stamp = tiny_model("modeling"), quantizer(group_size=16)
    before = make_tensors(architecture, torch.bfloat16)
    folder = write_folder(tmp_path / "folder", architecture, "latent", stamp, before)
    model, _ = fine_tune(folder, tmp_path / "out", torch.bfloat16, 3)
    output = tmp_path / "wq.safetensors"
    qat_convert(
        tmp_path / "out" / "saved" / "model.safetensors",
        output,
        quant_type="ternary",
        group_size=16,
        force=True,
    )
    weights = weights_of_forward(model, torch.arange(8)[None], monkeypatch)
    converted = load_file(output)
    projections = [n for n in converted if find_projection(n)]
    assert len(projections) == 14
    assert all(torch.equal(converted[n], weights[n]) for n in projections)


@pytest.mark.slow
def test_the_trainer_saves_checkpoints_that_resume(tmp_path):
    from transformers import Trainer, TrainingArguments

    architecture, stamp = tiny_model("modeling", **TIED), quantizer()
    tensors = make_tensors(architecture, torch.float32)
    folder = write_folder(tmp_path / "folder", architecture, "latent", stamp, tensors)
    results = []
    for steps, resume in ((4, None), (6, tmp_path / "out" / "checkpoint-4"), (6, None)):
        settings = TrainingArguments(
            output_dir=str(tmp_path / ("whole" if steps == 6 and not resume else "out")),
            max_steps=steps,
            save_steps=4,
            per_device_train_batch_size=16,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        model = load(folder)
        trainer = Trainer(model=model, args=settings, train_dataset=Sentences())
        trainer.train(resume_from_checkpoint=resume and str(resume))
        results.append(model.state_dict())
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert trusted_modeling_files(checkpoint)
    block = json.loads((folder / "config.json").read_text())["bitcpm_quantizer"]
    assert json.loads((checkpoint / "config.json").read_text())["bitcpm_quantizer"] == block
    _, resumed, whole = results
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
