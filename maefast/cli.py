"""The command line: `maefast pretrain | data-speed | profile | recipes | reconstruct | probe | finetune | ...`.

Only what a command needs is imported, when it runs, so that `maefast --help` and `maefast doctor` work without the
training extra.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .cli_arguments import (
    Amp,
    AnyDevice,
    Device,
    Dtype,
    Ema,
    Format,
    Graph,
    Heads,
    ImgSize,
    MaxPixels,
    Name,
    OptimState,
    Picture,
    Pool,
    Source,
    ValueRange,
)
from .train.options import HELP, STREAM, fine, option

app = typer.Typer(
    name="maefast",
    help="Masked autoencoders on fused kernels: pre-train, look at reconstructions, export the encoder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"maefast {__version__}")
        raise typer.Exit


@app.command()
def pretrain(
    ctx: typer.Context,
    data: Annotated[str, option("data")] = "",
    column: Annotated[str | None, option("column")] = None,
    stream: Annotated[bool, option("stream")] = False,
    shuffle: Annotated[int, option("shuffle")] = 1000,
    recipe: Annotated[str | None, option("recipe")] = None,
    size: Annotated[str | None, option("size")] = None,
    demo: Annotated[bool, option("demo")] = False,
    model: Annotated[str, option("model")] = "mae_base",
    model_arg: Annotated[list[str] | None, option("model_arg")] = None,
    img_size: Annotated[str | None, option("img_size")] = None,
    patch_size: Annotated[int | None, option("patch_size")] = None,
    mask_ratio: Annotated[float | None, option("mask_ratio")] = None,
    norm_pix: Annotated[bool | None, option("norm_pix")] = None,
    init_from: Annotated[str | None, option("init_from")] = None,
    init_ema: Annotated[bool, option("init_ema")] = False,
    init_exact: Annotated[bool, option("init_exact")] = False,
    recompute: Annotated[bool, option("recompute")] = False,
    epochs: Annotated[float, option("epochs")] = 400.0,
    steps: Annotated[int | None, option("steps")] = None,
    batch_size: Annotated[int, option("batch_size")] = 64,
    accum: Annotated[int, option("accum")] = 1,
    blr: Annotated[float, option("blr")] = 1.5e-4,
    lr: Annotated[float | None, option("lr")] = None,
    min_lr: Annotated[float, option("min_lr")] = 0.0,
    warmup: Annotated[float, option("warmup")] = 0.05,
    weight_decay: Annotated[float, option("weight_decay")] = 0.05,
    betas: Annotated[tuple[float, float], option("betas")] = (0.9, 0.95),
    clip: Annotated[float | None, option("clip")] = None,
    optim_state: Annotated[OptimState, option("optim_state")] = OptimState.fp32,
    crop_scale: Annotated[tuple[float, float], option("crop_scale")] = (0.2, 1.0),
    crop_ratio: Annotated[tuple[float, float], option("crop_ratio")] = (0.75, 4 / 3),
    flip: Annotated[float, option("flip")] = 0.5,
    value_range: Annotated[str, option("value_range")] = "auto",
    channels: Annotated[int | None, option("channels")] = None,
    mean: Annotated[str | None, option("mean")] = None,
    std: Annotated[str | None, option("std")] = None,
    pixel_bits: Annotated[int, option("pixel_bits")] = 8,
    max_pixels: Annotated[int | None, option("max_pixels")] = None,
    skip_bad: Annotated[bool, option("skip_bad")] = False,
    workers: Annotated[int | None, option("workers")] = None,
    gpu_decode: Annotated[bool, option("gpu_decode")] = False,
    cache_mb: Annotated[int, option("cache_mb")] = 512,
    amp: Annotated[Amp, option("amp")] = Amp.no,
    device: Annotated[Device, option("device")] = Device.auto,
    graph: Annotated[Graph, option("graph")] = Graph.auto,
    fsdp: Annotated[bool, option("fsdp")] = False,
    seed: Annotated[int, option("seed")] = 0,
    output_dir: Annotated[str, option("output_dir")] = "out",
    config: Annotated[Path | None, option("config")] = None,
    resume: Annotated[str, option("resume")] = "auto",
    save_every: Annotated[int, option("save_every")] = 500,
    keep: Annotated[int, option("keep")] = 3,
    picture_every: Annotated[int, option("picture_every")] = 1000,
    picture_rows: Annotated[int, option("picture_rows")] = 6,
    picture: Annotated[Picture, option("picture")] = Picture.restored,
    log_every: Annotated[int, option("log_every")] = 10,
    tensorboard: Annotated[bool, option("tensorboard")] = True,
    wandb: Annotated[str | None, option("wandb")] = None,
    probe_every: Annotated[int, option("probe_every")] = 0,
    probe_data: Annotated[str | None, option("probe_data")] = None,
    probe_labels: Annotated[str, option("probe_labels")] = "folders",
) -> None:
    """Pre-train a masked autoencoder.

    One GPU or CPU: run it as it is. Several: torchrun --nproc-per-node 8 -m maefast.cli pretrain …, or accelerate
    launch. Ctrl-C (or SIGTERM) finishes the step and saves; the same command goes on from there.

    Examples: maefast pretrain --data photos/ --model mae_small --img-size 96 --patch-size 8 --amp bf16

    maefast pretrain --data photos/ --model spark_resnet50 --img-size 96

    maefast pretrain --recipe videomae --demo
    """
    given = {name: value for name, value in ctx.params.items() if _was_given(ctx, name)}

    def run() -> None:
        config = _configured(given)
        from .train.loop import pretrain as train

        train(config)
        _leave_group()

    _run(run)


@app.command("data-speed")
def data_speed(
    ctx: typer.Context,
    data: Annotated[str, option("data")] = "",
    recipe: Annotated[str | None, option("recipe")] = None,
    size: Annotated[str | None, option("size")] = None,
    model: Annotated[str, option("model")] = "mae_base",
    model_arg: Annotated[list[str] | None, option("model_arg")] = None,
    img_size: Annotated[str | None, option("img_size")] = None,
    patch_size: Annotated[int | None, option("patch_size")] = None,
    column: Annotated[str | None, option("column")] = None,
    stream: Annotated[bool, typer.Option("--stream", help=STREAM)] = False,
    shuffle: Annotated[int, option("shuffle")] = 1000,
    channels: Annotated[int | None, option("channels")] = None,
    batch_size: Annotated[int, option("batch_size")] = 64,
    workers: Annotated[int | None, option("workers")] = None,
    gpu_decode: Annotated[bool, option("gpu_decode")] = False,
    skip_bad: Annotated[bool, option("skip_bad")] = False,
    amp: Annotated[Amp, option("amp")] = Amp.no,
    device: Annotated[Device, option("device")] = Device.auto,
    config: Annotated[Path | None, option("config")] = None,
    seconds: Annotated[float, typer.Option(help="For each measurement, about.")] = 5.0,
) -> None:
    """Say whether data keep up with training: what they give a second, what a step takes, which is the bottleneck.

    Example: maefast data-speed --data photos/ --model mae_base --amp bf16 --workers 8
    """
    given = {name: value for name, value in ctx.params.items() if _was_given(ctx, name) and name != "seconds"}

    def run() -> None:
        from .train.data_speed import data_speed as measure

        measure(_configured(given), seconds, typer.echo)

    _run(run)


@app.command()
def profile(
    ctx: typer.Context,
    data: Annotated[
        str, typer.Option(help="As of pretrain; without it, one batch of what ships is kept.", show_default=False)
    ] = "",
    recipe: Annotated[str | None, option("recipe")] = None,
    size: Annotated[str | None, option("size")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The recipe in the size of its demo.")] = False,
    model: Annotated[str, option("model")] = "mae_base",
    model_arg: Annotated[list[str] | None, option("model_arg")] = None,
    img_size: Annotated[str | None, option("img_size")] = None,
    patch_size: Annotated[int | None, option("patch_size")] = None,
    mask_ratio: Annotated[float | None, option("mask_ratio")] = None,
    recompute: Annotated[bool, option("recompute")] = False,
    column: Annotated[str | None, option("column")] = None,
    stream: Annotated[bool, typer.Option("--stream", help=STREAM)] = False,
    channels: Annotated[int | None, option("channels")] = None,
    batch_size: Annotated[int, option("batch_size")] = 64,
    clip: Annotated[float | None, option("clip")] = None,
    optim_state: Annotated[OptimState, option("optim_state")] = OptimState.fp32,
    workers: Annotated[int | None, option("workers")] = None,
    cache_mb: Annotated[int, option("cache_mb")] = 512,
    skip_bad: Annotated[bool, option("skip_bad")] = False,
    amp: Annotated[Amp, option("amp")] = Amp.no,
    device: Annotated[Device, option("device")] = Device.auto,
    config: Annotated[Path | None, option("config")] = None,
    steps: Annotated[int, typer.Option(help="How many are timed, and as many recorded.")] = 5,
    trace: Annotated[
        Path | None, typer.Option(help="Write the last step as a Chrome trace (.json, .json.gz).", show_default=False)
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write what was found as JSON.", show_default=False)] = None,
) -> None:
    """Say where a training step's time and memory go, what bounds it, and which option would help.

    Example: maefast profile --data photos/ --model mae_base --amp bf16 --trace step.json
    """
    own = ("steps", "trace", "json")
    given = {name: value for name, value in ctx.params.items() if _was_given(ctx, name) and name not in own}

    def run() -> None:
        from .train.parse import must_be_file
        from .train.profiling import profile_run

        must_be_file("--json", json)
        report = profile_run(_configured(given), steps, trace, typer.echo)
        report.show(heading=False)  # which was said at the start
        if json is not None:
            json.write_text(report.json() + "\n")

    _run(run)


@app.command("accelerate-check")
def accelerate_check(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A function or class without arguments that makes the model; also FILE.py:FACTORY.",
            show_default=False,
        ),
    ],
    input: Annotated[
        list[str] | None,
        typer.Option(
            help="Shape of an input, batch included: 8x3x224x224, or NAME=8x3x224x224. Several times for several.",
            show_default="a guess from the model",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="MODULE:FUNCTION or FILE.py:FUNCTION that returns the input: a tensor, a tuple, a dict of keywords.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Of an input that is guessed.", show_default="8, of videos 2")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="bfloat16: under autocast.")] = Dtype.float32,
    device: Annotated[AnyDevice, typer.Option(help="auto: CUDA where there is a device.")] = AnyDevice.auto,
    train: Annotated[bool, typer.Option("--train/--eval", help="Forward and backward, or forward alone.")] = True,
    seconds: Annotated[float, typer.Option(help="For the times, about; comparing comes on top.")] = 5.0,
    json: Annotated[Path | None, typer.Option(help="Write what was found as JSON.", show_default=False)] = None,
) -> None:
    """Say what accelerate would replace in a model of your own, and how equal and how fast it is then, here.

    The model is made twice, and one of the two is accelerated. Exit status: 0 replaced and equal, 1 nothing replaced
    (or an error), 4 the two differ by more than rounding explains.

    Example: maefast accelerate-check mine.py:build --batch-size 16 --dtype bfloat16
    """

    def run() -> int:
        from .check import accelerate_check as check
        from .train.parse import must_be_file

        must_be_file("--json", json)
        found = check(
            factory,
            input or (),
            batch,
            batch_size=batch_size,
            dtype=dtype.value,
            device=device.value,
            training=train,
            seconds=seconds,
            say=typer.echo,
        )
        found.show()
        if json is not None:
            json.write_text(found.json() + "\n")
        return found.status

    raise typer.Exit(_run(run))


def _configured(given: dict[str, Any]) -> Any:
    """The PretrainConfig of options that were given, upon those of a file and of a recipe."""
    from .errors import ConfigError
    from .train.config import PretrainConfig, load_config
    from .train.parse import parse_model_args, parse_size

    path = given.pop("config", None)
    options = with_recipe(load_config(path) if path else {}, given)
    for winner, loser in (("steps", "epochs"), ("lr", "blr")):
        if winner in given and loser in given:
            raise ConfigError(f"give --{winner} or --{loser}, not both")
        if loser in given:  # or a file's --steps would silently win over the --epochs just typed
            options[winner] = None
    pairs = given.pop("model_arg", None)
    options.update({name: value.value if isinstance(value, Enum) else value for name, value in given.items()})
    if pairs:
        options["model_args"] = {**options.get("model_args", {}), **parse_model_args(pairs)}
    if isinstance(options.get("img_size"), str):
        options["img_size"] = parse_size(options["img_size"])
    return PretrainConfig(**options)


def with_recipe(options: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Options of a file, upon those of the recipe that is named there or on the command line; takes `demo` from
    `given`."""
    from .errors import ConfigError
    from .train.build import recipe_options

    demo, name = given.pop("demo", False), given.get("recipe", options.get("recipe"))
    if name is None:
        if demo:
            raise ConfigError("--demo goes with --recipe; `maefast recipes` lists them")
        return options
    for other in ("model", *(("size",) if demo else ())):
        if other in given:
            raise ConfigError(f"give --{other} or --{'demo' if other == 'size' else 'recipe'}, not both")
    usual = recipe_options(name, demo=demo)
    if demo:
        usual["output_dir"] = str(Path("out") / f"{name}-demo")
    if "model_args" in usual and "model_args" in options:
        options = {**options, "model_args": {**usual["model_args"], **options["model_args"]}}
    for winner, loser in (("steps", "epochs"), ("lr", "blr"), ("epochs", "steps"), ("blr", "lr")):
        if winner in options and loser not in options:
            usual.pop(loser, None)
    return {**usual, **options}


@app.command()
def recipes() -> None:
    """List the published systems that `maefast pretrain --recipe` trains."""

    def run() -> None:
        from rich.console import Console
        from rich.table import Table

        from .recipes import list as all_recipes

        table = Table("recipe", "system", "learns from", "sizes", "paper", box=None, pad_edge=False)
        for spec in all_recipes():
            table.add_row(spec.name, spec.title, spec.modality, ", ".join(spec.sizes), spec.paper)
        Console(width=None if sys.stdout.isatty() else 160).print(table)

    _run(run)


@app.command()
def reconstruct(
    checkpoint: Source,
    images: Annotated[
        list[str],
        typer.Argument(help="Image files; or folders, lists, tars, tables, as of --data.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write: .png, .jpg, .webp.")] = Path(
        "reconstruction.png"
    ),
    count: Annotated[int, typer.Option(min=1, help="Images of each folder, list, tar or table.")] = 8,
    column: Annotated[str | None, typer.Option(help=HELP["Data"]["column"], show_default=False)] = None,
    mask_ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of the patches that is masked.", show_default="the model's: 0.75, masked convnets 0.6"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Fixes the masks.")] = 0,
    picture: Annotated[Picture, typer.Option(help=HELP["Output and resuming"]["picture"])] = Picture.restored,
    norm_pix: Annotated[
        bool | None,
        typer.Option(help="How a published .pth was trained; our own checkpoints know.", show_default=False),
    ] = None,
    model: Name = None,
    img_size: ImgSize = None,
    heads: Heads = None,
    ema: Ema = False,
    value_range: ValueRange = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Draw original | masked | reconstruction | pasted for some images."""

    def run() -> None:
        from .train.reconstruct import reconstruct_files

        reconstruct_files(
            checkpoint,
            images,
            output,
            count=count,
            column=column,
            mask_ratio=mask_ratio,
            seed=seed,
            raw=picture is Picture.raw,
            norm_pix=norm_pix,
            name=model,
            **_shapes(img_size, heads),
            ema=ema,
            value_range=value_range,
            max_pixels=max_pixels,
        )
        typer.echo(f"wrote {output}")

    _run(run)


@app.command()
def probe(
    checkpoint: Source,
    data: Annotated[str, typer.Option(help="Samples with classes, as pretrain's --data.", show_default=False)],
    labels: Annotated[
        str,
        typer.Option(help="folders: the first folder of each file is its class; or a CSV file of names and classes."),
    ] = "folders",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for probe.json, pictures, and features that were computed.")
    ] = Path("probe"),
    test: Annotated[
        str | None, typer.Option(help="Samples to hold back, instead of a share.", show_default=False)
    ] = None,
    test_labels: Annotated[str | None, typer.Option(help="Classes of --test.", show_default="as --labels")] = None,
    test_share: Annotated[float, typer.Option(help="Share of each class that is held back, without --test.")] = 0.2,
    k: Annotated[int, typer.Option("--k", help="Neighbours that vote.")] = 20,
    pool: Annotated[
        Pool, typer.Option(help="Features: mean of all patches, class token, both; attentive: a third probe learns it.")
    ] = Pool.mean,
    tsne: Annotated[bool, typer.Option("--tsne", help="Draw the classes by t-SNE too.")] = False,
    baselines: Annotated[
        bool,
        typer.Option("--baselines", help="The same with random weights, and with pixels (up to 32x32) for features."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Fixes what is held back, and random weights.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Samples that are encoded together.")] = 64,
    workers: Annotated[int | None, typer.Option(help=HELP["Data"]["workers"], show_default="up to 8")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out unreadable samples instead of stopping.")
    ] = False,
    model: Name = None,
    img_size: ImgSize = None,
    heads: Heads = None,
    ema: Ema = False,
    value_range: ValueRange = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Tell what was learned: k-NN and linear accuracy of frozen features.

    The encoder sees whole inputs, nothing masked, in centre crops; it is not trained. Accuracies have a 95 % interval
    (Wilson). Features are kept, so that another --k, --pool or share costs nothing.

    Example: maefast probe out/ --data photos/ --labels folders --baselines
    """

    def run() -> None:
        from .train.config import default_workers
        from .train.probe import Options
        from .train.probe import probe as probe_weights

        options = Options(
            labels=labels,
            test=test,
            test_labels=test_labels,
            test_share=test_share,
            k=k,
            pool=pool.value,
            tsne=tsne,
            baselines=baselines,
            seed=seed,
            batch_size=batch_size,
            workers=default_workers() if workers is None else workers,
            skip_bad=skip_bad,
            value_range=value_range,
            max_pixels=max_pixels,
        )
        probe_weights(
            checkpoint,
            data,
            output,
            options,
            name=model,
            **_shapes(img_size, heads),
            ema=ema,
            say=typer.echo,
        )

    _run(run)


@app.command()
def finetune(
    ctx: typer.Context,
    checkpoint: Source,
    data: Annotated[str, fine("data")],
    labels: Annotated[str, fine("labels")] = "folders",
    val_data: Annotated[str | None, fine("val_data")] = None,
    val_labels: Annotated[str | None, fine("val_labels")] = None,
    val_share: Annotated[float, fine("val_share")] = 0.2,
    epochs: Annotated[float | None, fine("epochs")] = None,
    steps: Annotated[int | None, option("steps")] = None,
    batch_size: Annotated[int, option("batch_size")] = 64,
    accum: Annotated[int, option("accum")] = 1,
    blr: Annotated[float | None, fine("blr")] = None,
    lr: Annotated[float | None, option("lr")] = None,
    layer_decay: Annotated[float | None, fine("layer_decay")] = None,
    weight_decay: Annotated[float | None, fine("weight_decay")] = None,
    warmup: Annotated[float | None, fine("warmup")] = None,
    drop_path: Annotated[float | None, fine("drop_path")] = None,
    smoothing: Annotated[float | None, fine("smoothing")] = None,
    mixup: Annotated[float | None, fine("mixup")] = None,
    cutmix: Annotated[float | None, fine("cutmix")] = None,
    ema_decay: Annotated[float | None, fine("ema_decay")] = None,
    crop_scale: Annotated[tuple[float, float], option("crop_scale")] = (0.08, 1.0),
    flip: Annotated[float, option("flip")] = 0.5,
    skip_bad: Annotated[bool, option("skip_bad")] = False,
    workers: Annotated[int | None, option("workers")] = None,
    amp: Annotated[Amp, option("amp")] = Amp.no,
    device: Annotated[Device, option("device")] = Device.auto,
    seed: Annotated[int, fine("seed")] = 0,
    output: Annotated[Path, fine("output")] = Path("finetune"),
    resume: Annotated[str, option("resume")] = "auto",
    save_every: Annotated[int, option("save_every")] = 500,
    eval_every: Annotated[int | None, fine("eval_every")] = None,
    wandb: Annotated[str | None, option("wandb")] = None,
    model: Name = None,
    img_size: ImgSize = None,
    heads: Heads = None,
    ema: Ema = False,
) -> None:
    """Train a classifier of a pre-trained encoder, and say how often it is right on samples that are held back.

    For mae_*, fcmae_* and spark_* models. What is not given is as their papers have it for the nearest size. Ctrl-C
    saves; the same command goes on from there.

    Example: maefast finetune out/ --data photos/ --val-data more/ --epochs 20 --amp bf16
    """
    given = {name: value for name, value in ctx.params.items() if _was_given(ctx, name)}

    def run() -> None:
        from .train.finetune import Options
        from .train.finetune import finetune as train

        options = Options.of({name: value.value if isinstance(value, Enum) else value for name, value in given.items()})
        train(
            checkpoint,
            data,
            output,
            options,
            name=model,
            **_shapes(img_size, heads),
            ema=ema,
            say=typer.echo,
        )
        _leave_group()

    _run(run)


@app.command()
def export(
    checkpoint: Source,
    output: Annotated[
        Path,
        typer.Argument(help="A .safetensors or .pth file; for hf also a folder, complete.", show_default=False),
    ],
    format: Annotated[Format, typer.Option(help="Layout to write.")] = Format.timm,
    model: Name = None,
    img_size: ImgSize = None,
    heads: Heads = None,
    ema: Ema = False,
) -> None:
    """Write the weights in another library's layout.

    timm: the encoder as timm's vit_*, resnet* or convnext* name it. hf: a ViT encoder for transformers' ViTModel, 5.x
    names; hf4: with 4.x names; hf-mae: the whole model for ViTMAEForPreTraining. mae: all weights under the model's own
    names, which are those of facebookresearch/mae and of SparK. official: the file that the authors' fine-tuning code
    reads: MAE's whole model, SparK's encoder alone, FCMAE's sparse kernels.
    """

    def run() -> None:
        from .train.export import export_file

        told = _shapes(img_size, heads)
        for line in export_file(checkpoint, output, format.value, name=model, ema=ema, **told):
            typer.echo(line)

    _run(run)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Show versions, devices, CPU features, and which backend serves each op, and why."""
    from . import doctor as module

    module.report(as_json=as_json)


# --help, too, is passed on: each benchmark has its own.
@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def bench(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(help="What to run; without it, the list.", show_default=False)] = None,
) -> None:
    """List the benchmarks, or run one; further arguments are passed on to it."""

    def run() -> int:
        from .bench import menu

        return menu.run(name, ctx.args, typer.echo)

    raise typer.Exit(_run(run) or 0)


def _shapes(img_size: str | None, heads: str | None) -> dict[str, Any]:
    """What a file may not tell, as it was given."""
    from .train.parse import parse_heads, parse_size

    return {
        "img_size": parse_size(img_size) if img_size else None,
        "heads": parse_heads(heads) if heads else None,
    }


def _leave_group() -> None:
    """Of the processes that a run was one of."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _was_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _run(command: Any) -> Any:
    """Run a command; an expected failure becomes one message and exit status 1."""
    from .errors import TrainError

    try:
        return command()
    except TrainError as error:
        text = str(error)
    except OSError as error:  # no space, no permission, not a folder; mostly of a file or folder that was named
        if error.errno is None:
            raise
        named = "" if error.filename is None else f"{error.filename}: "
        text = f"{named}{error.strerror or error}"
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # by its name: safetensors may not be installed
            raise
        text = str(error)
    typer.secho(f"error: {text}", err=True, fg=typer.colors.RED)
    raise typer.Exit(1)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A name of a file may be no text in any encoding, and a command must not end by telling it.
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    sys.exit(main())
