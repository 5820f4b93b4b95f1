"""The ternary linears against an unsharded reference written here, and what ternarize_ refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.model_factory import tiny_model
from helpers.numpy_sums import row_sums
from helpers.ranks import run_ranks
from helpers.tiny_models import tiny_run
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from megatron_bitcpm import ops
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.errors import BitcpmError, ModelError
from megatron_bitcpm.parallel.convert import ternarize_
from megatron_bitcpm.parallel.linear import ternary_class

pytestmark = pytest.mark.both_versions


def reference_scales(w_OI: np.ndarray, slices: int) -> np.ndarray:
    """Mean |w| of whole rows, from slice sums that are added in slice order."""
    total = row_sums(w_OI.astype(np.float32), slices)
    return np.maximum(total * np.float32(1 / w_OI.shape[1]), np.float32(1e-5))


def reference_weight(w_OI: np.ndarray, slices: int) -> np.ndarray:
    s = reference_scales(w_OI, slices)[:, None]
    return np.clip(np.rint(w_OI / s), -1, 1) * s


def gather_weights(rank: int, mode: str, scale_sync: str, tp: int) -> list:
    """Latent and quantised shards of every linear, by name."""
    quant = QuantConfig(requantize=mode, scale_sync=scale_sync)
    shards = []
    with tiny_run(quant, tp=tp) as run:
        run.train_step(0)
        run.train_step(1)
        with run.ternary.latents():
            latents = [s.weight.detach().float().numpy().copy() for s in run.ternary.sites]
        run.ternary.requantizer.refresh()
        for site, latent in zip(run.ternary.sites, latents, strict=True):
            if mode == "every_step":
                wq = site.weight.detach()
            else:
                wq = site.fake_quantize(site.weight.detach())
            shards.append((site.name, site.row_parallel, latent, wq.float().numpy().copy()))
    return shards


@pytest.mark.parametrize("mode", ["every_step", "every_forward"])
def test_row_parallel_scales_are_those_of_the_full_row(mode):
    ranks = run_ranks(2, gather_weights, mode, "exact", 2)
    for (name, row, latent_0, wq_0), (_, _, latent_1, wq_1) in zip(*ranks, strict=True):
        axis = 1 if row else 0
        latent = np.concatenate([latent_0, latent_1], axis)
        expected = reference_weight(latent, slices=2 if row else 1)
        expected = torch.from_numpy(expected).bfloat16().float().numpy()
        np.testing.assert_array_equal(np.concatenate([wq_0, wq_1], axis), expected, err_msg=name)


def test_local_scales_are_those_of_the_shard():
    ranks = run_ranks(2, gather_weights, "every_step", "local", 2)
    for shards in ranks:
        for name, _, latent, wq in shards:
            expected = torch.from_numpy(reference_weight(latent, 1)).bfloat16().float().numpy()
            np.testing.assert_array_equal(wq, expected, err_msg=name)


def gradient_of_weight(rank: int) -> bool:
    """The latent weight gets exactly the gradient of the quantised weight."""
    with tiny_run(QuantConfig(requantize="every_forward"), dtype=torch.float32) as run:
        run.forward_backward(0)
        latent_grads = [s.weight.main_grad.clone() for s in run.ternary.sites]
        with torch.no_grad():
            for site in run.ternary.sites:
                site.weight.copy_(site.fake_quantize(site.weight))
        # The same model with the quantised values as ordinary weights.
        for site in run.ternary.sites:
            site.module.__class__ = type(site.module).__mro__[2]
        run.forward_backward(0)
        return all(
            torch.equal(g, s.weight.main_grad)
            for g, s in zip(latent_grads, run.ternary.sites, strict=True)
        )


def test_gradient_is_straight_through():
    assert run_ranks(1, gradient_of_weight) == [True]


def build_and_report(rank: int) -> tuple:
    quant = QuantConfig(requantize="every_step", eps=0.03, grid="five", activation="int8_per_token")
    asked = []
    ops.use_backend = lambda *args: asked.append(args)
    ops.describe_backend = lambda *args: " ".join(args)
    with tiny_run(quant) as run:
        model = run.chunk.module.module
        layer = model.decoder.layers[1]
        return (
            type(layer.mlp.linear_fc1).__name__ == "TernaryColumnParallelLinear",
            type(layer.mlp.linear_fc2).__name__ == "TernaryRowParallelLinear",
            hasattr(model.output_layer, "ternary"),
            run.ternary.report(),
            run.ternary.quantizer.stamp(),
            sorted(name for name, _ in model.named_parameters())[:3],
            asked,
        )


def test_report_stamp_and_untouched_parts():
    column, row, output_layer, report, stamp, names, asked = run_ranks(1, build_and_report)[0]
    assert column and row and not output_layer
    assert report.startswith("8 ternary linears, 122,880 weights on this rank; five, ")
    assert report.endswith("\n  operators: cpu five int8_per_token")
    assert asked == [("auto", "cpu", "five", "int8_per_token")]
    assert "2 x linear_fc2   row    [64, 256]" in report
    assert stamp["group_size"] == -1 and stamp["tensor_model_parallel_size"] == 1
    assert stamp["eps"] == 0.03
    assert names[0] == "decoder.final_layernorm.weight"


def copy_refused(rank: int) -> str:
    with tiny_run(QuantConfig()) as run:
        try:
            copy.deepcopy(run.ternary.sites[0])
        except ModelError as error:
            return str(error)
        return "copied"


def test_a_ternary_linear_is_not_copied():
    message = run_ranks(1, copy_refused)[0]
    assert message.endswith(
        "a ternary linear cannot be copied. Build the model again and load the state_dict taken "
        "within latents()."
    )


def filtered_names(rank: int, changes: dict) -> tuple:
    with tiny_run(QuantConfig(**changes), model=tiny_model(num_layers=4)) as run:
        return [s.name for s in run.ternary.sites], run.ternary.excluded


def test_filters_by_layer_and_name():
    changes = {
        "full_precision_first_layers": 1,
        "full_precision_last_layers": 1,
        "exclude": ("*.linear_proj", "decoder.layers.2.mlp.*"),
    }
    names, excluded = run_ranks(1, filtered_names, changes)[0]
    assert sorted(names) == [
        "decoder.layers.1.mlp.linear_fc1",
        "decoder.layers.1.mlp.linear_fc2",
        "decoder.layers.1.self_attention.linear_qkv",
        "decoder.layers.2.self_attention.linear_qkv",
    ]
    assert len(excluded) == 12


def refusals(rank: int) -> dict[str, str]:
    """Every way ternarize_ and attach_optimizer refuse, by name."""
    messages = {}

    def expect(name, call):
        try:
            call()
        except BitcpmError as error:
            messages[name] = str(error)

    with tiny_run(None) as run:
        model = run.chunk.module.module
        expect("disabled", lambda: ternarize_(model, QuantConfig(enabled=False)))
        expect("group", lambda: ternarize_(model, QuantConfig(group_size=48)))
        expect("count", lambda: ternarize_(model, QuantConfig(), expected=7))
        expect("filter", lambda: ternarize_(model, QuantConfig(exclude=("*.down_proj",))))
        expect("all excluded", lambda: ternarize_(model, QuantConfig(exclude=("*",))))
        messages["unchanged"] = str(hasattr(model.decoder.layers[0].mlp.linear_fc1, "ternary"))
        model.decoder.layers[1].mlp.linear_fc2 = torch.nn.Linear(256, 64, bias=False)
        expect("foreign", lambda: ternarize_(model, QuantConfig()))
        model.decoder.layers = model.decoder.layers[:1]
        ternarize_(model, QuantConfig())
        expect("twice", lambda: ternarize_(model, QuantConfig()))
    with tiny_run(QuantConfig(requantize="every_step"), attach=False) as run:
        expect("unattached", lambda: run.forward_backward(0))
    with tiny_run(QuantConfig(requantize="every_step"), attach=False, dtype=torch.float32) as run:
        expect("fp32", lambda: run.ternary.attach_optimizer(run.optimizer))
    with tiny_run(
        QuantConfig(requantize="every_step"),
        attach=False,
        dtype=torch.float32,
        distributed_optimizer=True,
    ) as run:
        expect("fp32 distributed", lambda: run.ternary.attach_optimizer(run.optimizer))
    with tiny_run(QuantConfig(requantize="every_step"), attach=False) as run:
        before = [s.weight.detach().clone() for s in run.ternary.sites]
        run.optimizer.chained_optimizers[0]._copy_main_params_to_model_params = lambda: None
        expect("no rewrite", lambda: run.ternary.attach_optimizer(run.optimizer))
        same = [torch.equal(a, s.weight) for a, s in zip(before, run.ternary.sites, strict=True)]
        messages["probe leaves weights"] = str(all(same))
    with tiny_run(QuantConfig(requantize="auto"), attach=False) as run:
        run.optimizer.chained_optimizers[0].config.use_precision_aware_optimizer = True
        run.ternary.attach_optimizer(run.optimizer)
        messages["auto"] = run.ternary.requantizer.mode
    with tiny_run(QuantConfig(requantize="every_step")) as run:
        expect(
            "reload after step", lambda: (run.train_step(0), run.optimizer.reload_model_params())
        )
    with tiny_run(QuantConfig(requantize="every_forward"), attach=False) as run:
        run.ternary.sites[0].module.gradient_accumulation_fusion = True
        expect("fusion", lambda: run.ternary.attach_optimizer(run.optimizer))
    with tiny_run(QuantConfig()) as run:
        # A model that calls the matrix multiplication behind the module's back.
        module = run.ternary.sites[2].module
        module.forward = lambda x: (torch.nn.functional.linear(x, module.weight), None)
        expect("never ran", lambda: run.train_step(0))
    return messages


def test_refusals():
    messages = run_ranks(1, refusals)[0]
    expected = {
        "disabled": "quant.enabled=False: there is nothing to swap",
        "group": "quant.group_size=48: ",
        "filter": "quant.exclude=*.down_proj: matches no linear of the model",
        "count": "8 ternary linears, expected 7",
        "all excluded": "has no linear to make ternary",
        "foreign": "model=decoder.layers.1.mlp.linear_fc2: Linear cannot be made ternary",
        "twice": "is ternary already",
        "unattached": "quant.requantize=every_step: the optimizer is not attached",
        "fp32": "has no separate main parameter (torch.float32)",
        "fp32 distributed": "has no separate main parameter (torch.float32)",
        "no rewrite": "this optimizer did not rewrite 8 of 8 ternary weights",
        "reload after step": "the model parameters hold quantised values",
        "fusion": "gradient_accumulation_fusion=True",
        "never ran": "1 of 8 ternary linears did not run since the last step",
    }
    for name, part in expected.items():
        assert part in messages[name], (name, messages[name])
    assert messages["unchanged"] == "False"
    assert messages["probe leaves weights"] == "True"
    assert messages["auto"] == "every_forward"


def exchanges_per_step(rank: int, mode: str, changes: dict) -> list[int]:
    """All-gathers of row statistics in each of three steps of four micro-batches."""
    counts = []
    calls = 0
    original = torch.distributed.all_gather

    def counting(*args, **kwargs):
        nonlocal calls
        calls += kwargs["group"] is run.ternary.sites[0].tp_group
        return original(*args, **kwargs)

    with tiny_run(QuantConfig(requantize=mode, **changes), tp=2, micro_batches=4) as run:
        torch.distributed.all_gather = counting
        try:
            for step in range(3):
                calls = 0
                run.train_step(step)
                counts.append(calls)
        finally:
            torch.distributed.all_gather = original
    return counts


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("every_step", {}),
        ("every_forward", {"group_size": "tensor"}),
        pytest.param("every_forward", {}, marks=pytest.mark.slow),
        pytest.param("every_forward", {"grid": "five"}, marks=pytest.mark.slow),
    ],
)
def test_one_exchange_serves_all_layers_of_an_optimizer_step(mode, changes):
    # every_step refreshes right after a step, so its first step has the initial refresh as well.
    assert run_ranks(2, exchanges_per_step, mode, changes)[0] == (
        [2, 1, 1] if mode == "every_step" else [1, 1, 1]
    )


def nested_latents(rank: int) -> tuple:
    with tiny_run(QuantConfig(requantize="every_step")) as run:
        run.train_step(0)
        site = run.ternary.sites[0]
        main = site.weight.main_param.bfloat16()
        with run.ternary.latents():
            with run.ternary.latents():
                inner = torch.equal(site.weight, main)
            outer = torch.equal(site.weight, main)
            refused = []
            for call in (lambda: run.forward_backward(1), lambda: run.optimizer.step()):
                try:
                    call()
                except ModelError as error:
                    refused.append(str(error).split(":")[0])
        return inner, outer, refused, torch.equal(site.weight, main)


def test_latents_nest_and_refuse_a_forward_inside():
    assert run_ranks(1, nested_latents)[0] == (
        True,
        True,
        ["latents=(forward)", "latents=(step)"],
        False,
    )


def input_of_another_name(rank: int) -> str:
    class Renamed(ColumnParallelLinear):
        """A linear that names the input of its matrix multiplication otherwise."""

        def forward(self, input_, *args, **kwargs):
            self._forward_impl = torch.nn.functional.linear
            return self._forward_impl(x=input_, weight=self.weight), None

    with tiny_run(QuantConfig(activation="int8_per_token", requantize="every_forward")) as run:
        module = run.ternary.sites[0].module
        module.__class__ = ternary_class(Renamed)
        try:
            run.forward_backward(0)
        except ModelError as error:
            return str(error)
        return "ran"


def test_int8_activations_need_the_input_by_name():
    assert run_ranks(1, input_of_another_name)[0] == (
        "quant.activation=int8_per_token: TernaryRenamed (decoder.layers.0.self_attention."
        "linear_proj) calls its matrix multiplication with weight, x, without `input`. Use none."
    )
