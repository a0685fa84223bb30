"""What `maefast pretrain --help` says about each option. The defaults are those of PretrainConfig."""

from __future__ import annotations

from typing import Any

import typer

HELP = {
    "Data": {
        "data": "A folder (any nesting); a list of files (.txt, .csv); tars ('shards/{0000..0127}.tar', also URLs); "
        "tables (.parquet, .arrow, folders of Hugging Face's datasets); 'skimage': the photographs inside scikit-image "
        "and scikit-learn.",
        "column": "Column of the table that holds images or paths; in tars with several images a sample, the ending of "
        "those that are meant (jpg, seg.png).",
        "stream": "Read tars (also .tar.gz, .tar.zst, ...) or Parquet front to back, shard by shard in a random order, "
        "without an index; needs --steps.",
        "shuffle": "With --stream: records that are held, and given out in random order, by each worker.",
        "crop_scale": "Area of the random crop as a share of the image: low high.",
        "crop_ratio": "Width / height of the crop, relative to that of the images the model takes: low high.",
        "flip": "Probability of a horizontal flip.",
        "value_range": "Pixel values that become black and white: LOW,HIGH for every file, or percentiles of a sample "
        "of the set (1%,99%). auto: by the bits of the files; floats and 32-bit integers by a sample.",
        "channels": "Images of numbers with so many channels, .npy, .npz, TIFF or pictures, taken as they are stored.",
        "mean": "With --channels: mean of each channel, N,N,… or one for all; else estimated once from a sample.",
        "std": "The same of the standard deviation.",
        "pixel_bits": "16 keeps sixteen bits of grey images up to the model (colour is read with 8).",
        "max_pixels": "Refuse larger images (0: none).",
        "skip_bad": "Count and skip unreadable images instead of stopping.",
        "workers": "Processes that load images; 0 loads in the main one.",
        "gpu_decode": "Decode JPEG files, crop and resize on the GPU (nvImageCodec). UNTESTED on a device so far.",
        "cache_mb": "Memory for decoded images, all workers together.",
    },
    "Model": {
        "recipe": "Train a published system by its name, with its paper's options: `maefast recipes` lists them.",
        "size": "Size of the recipe.",
        "demo": "With --recipe: a run of a minute or two on what ships with it, which leaves a picture.",
        "model": "Instead of a recipe, the name of a model of images: mae_tiny, mae_small, mae_base, mae_large, "
        "mae_huge; masked convnets: spark_resnet50, spark_resnet101, spark_convnext_{tiny,small,base,large}, "
        "fcmae_convnextv2_{atto,femto,pico,nano,tiny,base,large,huge}.",
        "model_arg": "An argument of the recipe or model, NAME=VALUE; repeatable. For example depth=6, or sync_bn=true "
        "(SparK).",
        "img_size": "Image size: N, or HEIGHTxWIDTH; multiples of 32 for masked convnets.",
        "patch_size": "Patch size; masked convnets have none: they mask cells of 32 x 32 pixels.",
        "mask_ratio": "Share of the patches that is masked.",
        "norm_pix": "Predict patches normalised by their own mean and variance.",
        "init_from": "Start from these weights: a run, a checkpoint, .safetensors, .pth, .ckpt, or a folder of Hugging "
        "Face (docs/checkpoints.md). Another image size, patch size or number of channels is made to fit.",
        "init_ema": "With --init-from: take the running average (EMA) that the file holds.",
        "init_exact": "With --init-from: refuse what does not fit as it is.",
        "recompute": "Save memory: compute activations inside blocks again in the backward (mae_* only).",
    },
    "Length and optimiser": {
        "epochs": "Passes over the data.",
        "steps": "Optimiser steps, instead of --epochs.",
        "batch_size": "Images per process and micro-batch.",
        "accum": "Micro-batches accumulated per step.",
        "blr": "Base learning rate; the peak is blr x batch-size x accum x processes / 256.",
        "lr": "Peak learning rate itself, instead of --blr.",
        "min_lr": "Learning rate at the end of the cosine.",
        "warmup": "Linear warm-up: below 1 a share of the run, else a number of steps.",
        "betas": "AdamW's decay rates of its running averages.",
        "weight_decay": "AdamW's decay of matrices (biases and norms have none).",
        "clip": "Clip the global norm of the gradient to this.",
        "optim_state": "fp32, or bf16: AdamW's moments in 4 bytes a parameter instead of 8 (docs/optimizer.md).",
    },
    "Machine": {
        "amp": "Mixed precision.",
        "device": "auto takes the GPU if there is one.",
        "graph": "A step as one CUDA graph, so that Python does not slow it down. auto: where it can be (one process, "
        "a CUDA device, no fp16); on: or stop, saying why not.",
        "fsdp": "Shard parameters, gradients and optimizer state over the processes of torchrun (FSDP2).",
        "seed": "Fixes weights, order, crops and masks.",
    },
    "Output and resuming": {
        "output_dir": "Where everything goes: checkpoints, metrics.csv, pictures, TensorBoard.",
        "config": "YAML or JSON of options (such as OUTPUT/config.yaml); options on the command line win.",
        "resume": "auto: go on from the newest checkpoint in OUTPUT, if any; none: a new run, refused where OUTPUT "
        "holds one; or a checkpoint.",
        "save_every": "Steps between checkpoints.",
        "keep": "How many checkpoints are kept.",
        "picture_every": "Steps between reconstruction pictures; 0: only at the end.",
        "picture_rows": "Images in the picture; 0: no picture.",
        "picture": "With normalised targets: restored puts predictions back with the true mean and variance of each "
        "hidden patch, so brightness is not guessed; raw uses nothing of the hidden pixels.",
        "log_every": "On a GPU, read the losses every so many steps (each one is logged).",
        "tensorboard": "Write TensorBoard events.",
        "wandb": "Log to this project of Weights & Biases too, a run there for each output folder.",
    },
    "What is learned": {
        "probe_every": "Steps between k-NN accuracies of the encoder's features, from step 0 on, in probe.csv and "
        "TensorBoard (docs/probe.md); the training stays the same to the bit. 0: none.",
        "probe_data": "Samples with classes for it, of which a fifth is held back.",
        "probe_labels": "Their classes: folders, or a CSV file of names and classes.",
    },
}

# Of commands that train a few steps of their own, whatever --steps says.
STREAM = HELP["Data"]["stream"].removesuffix("; needs --steps.") + "."

# What stands for a default that is no value.
_SHOWN = {
    "img_size": "the model's, 224",
    "patch_size": "the model's",
    "mask_ratio": "the model's: 0.75, masked convnets 0.6",
    "norm_pix": "yes (SparK: always)",
    "workers": "up to 8, one core left free",
    "max_pixels": "179 million, Pillow's limit",
    "clip": "no clipping",
    "size": "the recipe's first",
    "column": "the only one that fits",
    "channels": "the model's, photographs",
    "mean": "estimated",
    "std": "estimated",
    **dict.fromkeys(
        ("data", "recipe", "model_arg", "init_from", "steps", "lr", "config", "probe_data", "wandb"), False
    ),
}
_FLAGS = {
    "output_dir": ("--output-dir", "-o"),
    "skip_bad": ("--skip-bad",),
    "gpu_decode": ("--gpu-decode",),
    "stream": ("--stream",),
    "recompute": ("--recompute",),
    "fsdp": ("--fsdp",),
    "demo": ("--demo",),
    "init_ema": ("--init-ema",),
    "init_exact": ("--init-exact",),
}

# The same of `maefast finetune`, where it has other words; None as a default: as the paper has it.
FINE = {
    "Data": {
        "data": "Samples with classes, as pretrain's --data.",
        "labels": "folders: the first folder of each file is its class; or a CSV file of names and classes.",
        "val_data": "Samples to hold back, instead of a share.",
        "val_labels": "Classes of --val-data.",
        "val_share": "Share of each class that is held back, without --val-data.",
    },
    "Length and optimiser": {
        "epochs": "Passes over the data.",
        "blr": "Base learning rate; the peak is blr x batch-size x accum x processes / 256.",
        "layer_decay": "Factor of the learning rate from each layer to the one before it.",
        "weight_decay": "AdamW's decay of matrices.",
        "warmup": "Linear warm-up: below 1 a share of the run, else a number of steps.",
        "drop_path": "Stochastic depth of the last block, rising linearly.",
        "smoothing": "Of labels.",
        "mixup": "Alpha of mixup; 0: none.",
        "cutmix": "Alpha of CutMix; 0: none.",
        "ema_decay": "Decay of a running average of the weights, which then is what counts; 0: none.",
    },
    "Machine": {"seed": "Fixes what is held back, the head, order, crops, mixtures."},
    "Output and resuming": {
        "output": "Folder for finetune.json, model.safetensors, metrics.csv, accuracy.csv, checkpoints.",
        "eval_every": "Steps between accuracies, from step 0 on.",
    },
}
_FINE_SHOWN = {
    **dict.fromkeys(FINE["Length and optimiser"], "published"),
    **{"data": False, "val_data": False, "val_labels": "as --labels", "eval_every": "an epoch"},
}


def fine(name: str) -> Any:
    """The typer.Option of one of `FINE`."""
    panel = next(panel for panel, entries in FINE.items() if name in entries)
    flags = ("--output", "-o") if name == "output" else ()
    shown = _FINE_SHOWN.get(name, True)
    return typer.Option(*flags, help=FINE[panel][name], rich_help_panel=panel, show_default=shown)


def option(name: str) -> Any:
    """The typer.Option of one field of PretrainConfig."""
    panel = next(panel for panel, entries in HELP.items() if name in entries)
    return typer.Option(
        *_FLAGS.get(name, ()),
        help=HELP[panel][name],
        rich_help_panel=panel,
        show_default=_SHOWN.get(name, True),
    )
