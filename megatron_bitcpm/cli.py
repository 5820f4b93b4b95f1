"""The `bitcpm` command: argument parsing and one call for each verb.

A wrong input prints one line and exits with code 2; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_bitcpm.errors import BitcpmError, ConfigError
from megatron_bitcpm.version import __version__

app = typer.Typer(
    help="Pretrain ternary (1.58-bit) language models with Megatron, convert and verify them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Tokenizers and datasets.", no_args_is_help=True)
export_app = typer.Typer(help="Write checkpoints in other formats.", no_args_is_help=True)
bench_app = typer.Typer(help="Measurements, printed as JSON.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(export_app, name="export")
app.add_typer(bench_app, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"megatron_bitcpm {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    del version


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML file of the run, see launch/configs.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from checkpoint.directory.")
    ] = False,
) -> None:
    """Train a model; start it under torchrun for more than one rank."""
    from megatron_bitcpm.config import env_world_size, load_config
    from megatron_bitcpm.training.trainer import train as run

    run(load_config(config, set_, env_world_size()), resume)


@data_app.command("tokenizer")
def data_tokenizer(
    input_: Annotated[
        list[str],
        typer.Option("--input", help="File or folder of text or JSONL, or stdlib: ; repeatable."),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the new tokenizer.")],
    vocab_size: Annotated[int, typer.Option(help="Number of token ids.")] = 4096,
    sample_mb: Annotated[float, typer.Option(help="Most text to learn from, in MB.")] = 32.0,
    jsonl_key: Annotated[str, typer.Option(help="Key of the text in JSONL lines.")] = "text",
    max_bad_lines: Annotated[int, typer.Option(help="Stop after so many bad lines.")] = 100,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
) -> None:
    """Train a SentencePiece tokenizer; AutoTokenizer loads the folder."""
    from megatron_bitcpm.data.tokenizer import train_tokenizer

    report = train_tokenizer(
        input_,
        output,
        vocab_size=vocab_size,
        sample_mb=sample_mb,
        jsonl_key=jsonl_key,
        max_bad_lines=max_bad_lines,
        overwrite=overwrite,
    )
    _print_json(report)


@data_app.command("prepare")
def data_prepare(
    input_: Annotated[
        list[str],
        typer.Option("--input", help="File or folder of text or JSONL, or stdlib: ; repeatable."),
    ],
    tokenizer: Annotated[Path, typer.Option(help="Any Hugging Face tokenizer folder.")],
    output_prefix: Annotated[Path, typer.Option(help="Prefix of the dataset files.")],
    valid_fraction: Annotated[
        float, typer.Option(help="Share of documents to validate on.")
    ] = 0.03,
    jsonl_key: Annotated[str, typer.Option(help="Key of the text in JSONL lines.")] = "text",
    document_chars: Annotated[
        int, typer.Option(help="Text files are cut into documents of at most so many characters.")
    ] = 4096,
    max_bad_lines: Annotated[int, typer.Option(help="Stop after so many bad lines.")] = 100,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files.")] = False,
) -> None:
    """Turn text into Megatron datasets, one to train and one to validate on."""
    from megatron_bitcpm.data.prepare import prepare

    report = prepare(
        input_,
        tokenizer,
        output_prefix,
        valid_fraction=valid_fraction,
        jsonl_key=jsonl_key,
        document_chars=document_chars,
        max_bad_lines=max_bad_lines,
        overwrite=overwrite,
    )
    _print_json(report)


@app.command("convert")
def convert_command(
    # Paths as they were typed: to `Path` the empty one is the working folder.
    input_: Annotated[
        str,
        typer.Option(
            "--input", metavar="PATH", help="Hugging Face folder, Megatron checkpoint, or run."
        ),
    ],
    output: Annotated[str, typer.Option(metavar="PATH", help="Folder to write.")],
    to: Annotated[str, typer.Option(help="torch_dist, legacy, plain, latent or pseudo.")],
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="Megatron: shards of each layer; default 1.")
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None, typer.Option(help="Megatron: pipeline stages; default 1.")
    ] = None,
    virtual_pipeline_parallel_size: Annotated[
        int | None, typer.Option(help="Megatron: chunks on each stage (interleaved).")
    ] = None,
    transformer_impl: Annotated[
        str | None,
        typer.Option(help="Legacy shards: names of local (default) or transformer_engine layers."),
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(help="Of a MiniCPM: minicpm (default) or llama, which folds its constants."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Tokenizer folder, where the input has none."),
    ] = None,
    quant_type: Annotated[
        str | None, typer.Option(help="Grid that trained unstamped latents, for example ternary.")
    ] = None,
    group_size: Annotated[
        str | None, typer.Option(help="... its inputs per scale; -1 is the row, or tensor.")
    ] = None,
    eps: Annotated[float | None, typer.Option(help="... its smallest scale; default 1e-5.")] = None,
    numerics: Annotated[
        str | None, typer.Option(help="... its arithmetic: fp32 (default) or bf16_reciprocal.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Hugging Face: largest weights file; default 5GB.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Hugging Face: safetensors (default) or bin.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on with latents that look untrained.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output, if it is a model.")
    ] = False,
) -> None:
    """Convert between Megatron and Hugging Face, and prove that nothing changed."""
    from megatron_bitcpm.conversion.convert import convert

    _print_report(
        convert(
            input_,
            output,
            to,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            virtual_pipeline_parallel_size=virtual_pipeline_parallel_size,
            transformer_impl=transformer_impl,
            architecture=architecture,
            tokenizer=tokenizer,
            quant_type=quant_type,
            group_size=group_size,
            eps=eps,
            numerics=numerics,
            max_shard_size=max_shard_size,
            weights=weights,
            force=force,
            overwrite=overwrite,
        )
    )


@export_app.command("hf")
def export_hf_command(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint, or a run (its newest one).")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder; default the run's own.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
) -> None:
    """Write a pseudo-quantised Hugging Face folder that any Llama runtime loads."""
    from megatron_bitcpm.conversion.hf.writer import export_hf

    _print_report(export_hf(checkpoint, output, tokenizer=tokenizer, overwrite=overwrite))


@app.command("verify")
def verify_command(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder, checkpoint, or run.")],
    other: Annotated[
        Path | None, typer.Argument(help="The model that it must equal, in any format and form.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder, where the models have none.")
    ] = None,
    logits: Annotated[
        Path | None,
        typer.Option(
            help="Prompts, one a line, or .jsonl: compare the next token's probabilities."
        ),
    ] = None,
    logits_key: Annotated[
        str | None, typer.Option(help="Key of the prompt in a .jsonl file; default prompt.")
    ] = None,
    logits_dtype: Annotated[
        str | None,
        typer.Option(help="OTHER computes in float32 (default), or auto: the type of its files."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the tables to this .md file, not to the terminal.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run modelling code of others.")
    ] = False,
) -> None:
    """Prove that every group lies on its grid and, with OTHER, that both are the same model.

    Without OTHER a changed sign, norm or embedding cannot be noticed. The exit code is 2 where
    anything differs; with --logits the table of predictions comes first.
    """
    from megatron_bitcpm.conversion.open import open_source
    from megatron_bitcpm.conversion.output_folder import check_report, write_report
    from megatron_bitcpm.conversion.verify import compare

    _check_tokenizer(tokenizer)
    only_with_logits: dict[str, Any] = {
        "logits-key": logits_key,
        "logits-dtype": logits_dtype,
        "trust-remote-code": trust_remote_code or None,
    }
    for name, value in only_with_logits.items():
        if value is not None and logits is None:
            raise BitcpmError(f"{name}={value}: has no effect without --logits. Leave it out.")
    if other is None:
        for name, value in {"logits": logits, "markdown": markdown}.items():
            if value is not None:
                raise BitcpmError(f"{name}={value}: needs two models. Name the second one.")
    if logits_key is not None and logits is not None and logits.suffix != ".jsonl":
        raise BitcpmError(
            f"logits-key={logits_key}: has no effect on {logits}, which is no .jsonl file. Leave "
            "it out."
        )
    if markdown is not None:
        check_report(markdown, [p for p in (model, other, tokenizer, logits) if p is not None])
    report = compare(
        open_source(model, tokenizer), open_source(other, tokenizer) if other else None, tokenizer
    )
    content, tables = report.content, report.render()
    if logits is not None and other is not None:
        from megatron_bitcpm.evaluation.logit_table import (
            logit_table,
            read_prompts,
            render_logit_table,
        )

        table = logit_table(
            model,
            other,
            read_prompts(logits, logits_key or "prompt"),
            tokenizer,
            logits_dtype or "float32",
            trust_remote_code,
        )
        content = content | {"logits": table}
        tables = f"{tables}\n{render_logit_table(table)}"
    if markdown is not None:
        write_report(markdown, tables)
    elif logits is not None or report.problems:
        typer.echo(tables, err=True)
    if logits is not None or not report.problems:
        _print_json(content)
    report.raise_problems()


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="Model folder, checkpoint, run, or weights file.")],
    fix_config: Annotated[
        bool,
        typer.Option("--fix-config", help="Correct config.json; keeps the old as config.json.bak."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder, where the model has none.")
    ] = None,
) -> None:
    """Say what a model is: architecture, contradictions, quantiser, grid, memory."""
    from megatron_bitcpm.conversion.inspect import inspect
    from megatron_bitcpm.conversion.inspect_text import render

    _check_tokenizer(tokenizer)
    report = inspect(path, fix_config=fix_config, tokenizer=tokenizer)
    if as_json:
        _print_json(report)
    else:
        typer.echo(render(report))


@app.command("generate")
def generate_command(
    model: Annotated[Path, typer.Option(help="Hugging Face folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among so many tokens; 0 among all.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run modelling code of others.")
    ] = False,
) -> None:
    """Continue a text with transformers."""
    from megatron_bitcpm.evaluation.generate import generate

    typer.echo(
        generate(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
    )


@bench_app.command("ops")
def bench_ops_command(
    out_features: Annotated[int, typer.Option(help="Rows of the weight.")] = 4096,
    in_features: Annotated[int, typer.Option(help="Columns of the weight.")] = 4096,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    group_size: Annotated[int, typer.Option(help="Inputs per scale; -1 is the row.")] = -1,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 31,
) -> None:
    """Time the CPU operators against memory and torch, interleaved in one process."""
    from megatron_bitcpm.bench.ops import bench_ops

    _print_json(bench_ops(out_features, in_features, dtype, group_size, rounds))


@bench_app.command("train")
def bench_train_command(
    pairs: Annotated[int, typer.Option(help="Interleaved pairs of steps.")] = 12,
) -> None:
    """Measure what ternary training costs beside full precision, on 0.5B layer shapes."""
    from megatron_bitcpm.bench.train import bench_train

    _print_json(bench_train(pairs))


@bench_app.command("save")
def bench_save_command(
    rounds: Annotated[int, typer.Option(help="Saves in each way.")] = 5,
) -> None:
    """Measure how long a checkpoint holds the training, written at once and in the background."""
    from megatron_bitcpm.bench.save import bench_save

    _print_json(bench_save(rounds))


@bench_app.command("convert")
def bench_convert_command(
    shape: Annotated[str, typer.Option(help="1B (3.2 GB), small or tiny.")] = "1B",
    rounds: Annotated[int, typer.Option(help="How often each conversion runs.")] = 1,
    cold: Annotated[
        bool, typer.Option("--cold", help="Drop the input from the page cache each time.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where to work; about four times the model's size.")
    ] = None,
) -> None:
    """Time conversions of a synthetic model against dd, and measure their memory."""
    from megatron_bitcpm.bench.convert import bench_convert

    _print_json(bench_convert(shape, rounds, cold, folder))


@app.command("compare")
def compare_command(
    runs: Annotated[list[str], typer.Argument(help="LABEL=RUN_FOLDER, one or more.")],
    plot: Annotated[Path | None, typer.Option(help="PNG file of the losses.")] = None,
) -> None:
    """Compare finished runs on their validation split, with a bigram model as the floor."""
    from megatron_bitcpm.evaluation.compare import compare_runs

    _print_json(compare_runs(runs, plot))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check what is installed and whether it works; name the fix of each problem."""
    from megatron_bitcpm.doctor import diagnose, exit_code, render_json, render_table

    findings = diagnose()
    typer.echo(render_json(findings) if as_json else render_table(findings))
    raise typer.Exit(exit_code(findings))


@app.command("config-schema")
def config_schema() -> None:
    """Print the JSON schema of the YAML file, for editors."""
    from megatron_bitcpm.config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `bitcpm` command."""
    from megatron_bitcpm.config import env_rank, env_world_size

    rank, world_size = env_rank(), env_world_size()
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        # A crash in compiled code says where in Python it was.
        faulthandler.enable(sys.__stderr__)
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", force=True
    )
    # Notes about absent accelerator libraries and names soon to be renamed: nothing that a user can
    # act on, and many of them on every rank.
    for category in (UserWarning, DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch)\b")
    # Megatron logs its configuration objects at this level.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    try:
        app(arguments)
    except BitcpmError as error:
        lines = error.problems if isinstance(error, ConfigError) else [str(error)]
        prefix = f"[rank {rank}] " if world_size > 1 else ""
        # One write, so that the lines of several ranks do not run together.
        sys.stderr.write("".join(f"{prefix}bitcpm: {line}\n" for line in lines))
        sys.stderr.flush()
        sys.exit(2)


def _check_tokenizer(tokenizer: Path | None) -> None:
    """Refuse a folder that is absent, also where the model turns out not to need it."""
    if tokenizer is not None and not tokenizer.is_dir():
        raise BitcpmError(f"tokenizer={tokenizer}: no such folder. Name another, or none.")


def _print_report(report: dict[str, Any]) -> None:
    """Print a report whose warnings a user should see though standard output goes to a file."""
    for warning in report.get("warnings", ()):
        typer.echo(f"bitcpm: {warning}", err=True)
    _print_json(report)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
