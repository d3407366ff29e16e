"""The commands of dsmoe as functions. Options have the names of the command's, with `_` for `-`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _native
from ._errors import ArgumentError

Path = str | PathLike[str]
Paths = Path | Iterable[Path]
Report = dict[str, Any]
Step = Callable[[dict[str, Any]], object]

# Names of options that are no names of arguments in Python.
_OTHER_NAMES = {"form": "as", "settings": "set"}
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "|u1"}


def _text(value: object) -> str:
    """Word a value as the command reads it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return os.fspath(value) if isinstance(value, PathLike) else str(value)


def _words(options: Mapping[str, Any]) -> list[str]:
    """Word options: None and False are left out, True is a flag, and lists and dictionaries repeat the option."""
    words = []
    for name, value in options.items():
        flag = "--" + _OTHER_NAMES.get(name, name).replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            words.append(flag)
        elif isinstance(value, Mapping):
            words += [f"{flag}={key}={_text(item)}" for key, item in value.items()]
        elif isinstance(value, Iterable) and not isinstance(value, (str, bytes, PathLike)):
            words += [f"{flag}={_text(item)}" for item in value]
        else:
            words.append(f"{flag}={_text(value)}")
    return words


def command(name: str, *positional: Path, on_step: Step | None = None, **options: Any) -> Report:
    """Run any command and return what it prints with `--json`: `command("data world", out="WORLD")`.

    Options have the names of the command's with `_` for `-`, and `form` and `settings` for `--as` and `--set`.
    """
    words = [*name.split(), *_words(options)]
    if positional:
        words += ["--", *(os.fspath(word) for word in positional)]
    report: Report = json.loads(_native.call(words, on_step))
    return report


def _command(name: str, arguments: dict[str, Any], *positional: Path, on_step: Step | None = None) -> Report:
    """Run a command with the arguments of its function, less those that are not options."""
    options = {key: value for key, value in arguments.items() if key not in ("model", "on_step")}
    return command(name, *positional, on_step=on_step, **options)


def set_threads(threads: int) -> None:
    """Choose the number of worker threads, before the first call that computes."""
    if not _native.start_threads(threads):
        raise ArgumentError("the worker threads run already; choose their number before the first call")


def inspect(model: Path, *, mean_active: float | None = None, context: int | None = None) -> Report:
    """Return the configuration, layout, parameters and FLOPs of a model, from its headers."""
    return _command("inspect", locals(), model)


def methods() -> list[Report]:
    """Return the methods of `prune` with their settings."""
    found: list[Report] = command("methods")["methods"]
    return found


def tensors(model: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the stored tensors of a model directory as read-only maps of its files: nothing is copied.

    NumPy has no bf16: such tensors come as uint16, the upper halves of f32.
    """
    files: dict[os.PathLike[str], npt.NDArray[np.uint8]] = {}
    found = {}
    for name, file, offset, dtype, shape in _native.tensors(model):
        if file not in files:
            files[file] = np.memmap(file, dtype=np.uint8, mode="r")
        kind = np.dtype(_DTYPES[dtype])
        size = kind.itemsize * int(np.prod(shape, dtype=np.int64))
        found[name] = files[file][offset : offset + size].view(kind).reshape(shape)
    return found


def convert(
    model: Path,
    *,
    out: Path,
    form: str | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    partition: Path | None = None,
    core: float | None = None,
    ridge: float | None = None,
    calib: Paths | None = None,
    doc_separator: str | None = None,
    text_column: str | None = None,
    bos: str | None = None,
    samples: int | None = None,
    seq: int | None = None,
    active_target: float | None = None,
    router_init: str | None = None,
    budgets: Iterable[float] | None = None,
    threshold: float | None = None,
    gate_value: str | None = None,
    rescale: str | None = None,
    zero_active: str | None = None,
    no_ste: bool = False,
    seed: int | None = None,
    force: bool = False,
) -> Report:
    """Cut the FFNs of a dense model into experts, or copy them (`form`)."""
    return _command("convert", locals(), model)


def prune(
    model: Path,
    *,
    method: str,
    budget: float | str,
    out: Path | None = None,
    settings: Mapping[str, object] | None = None,
    calib: Paths | None = None,
    doc_separator: str | None = None,
    text_column: str | None = None,
    bos: str | None = None,
    samples: int | None = None,
    seq: int | None = None,
    seed: int | None = None,
    dry_run: bool = False,
    resume: bool = False,
    force: bool = False,
) -> Report:
    """Make a model with fewer activated parameters by one of the methods that `methods` lists.

    With `resume=True` an interrupted work of a method that keeps its parts continues.
    """
    return _command("prune", locals(), model)


def train(
    model: Path,
    *,
    out: Path,
    data: Paths | None = None,
    mixture: Path | None = None,
    cache: Path | None = None,
    doc_separator: str | None = None,
    text_column: str | None = None,
    steps: int | None = None,
    tokens: int | str | None = None,
    batch: int | None = None,
    seq: int | None = None,
    accumulate: int | None = None,
    lanes: int | None = None,
    lr: float | None = None,
    warmup_steps: int | None = None,
    router_lr_scale: float | None = None,
    sparsity: float | None = None,
    active_target: float | str | None = None,
    hold: str | None = None,
    separability: float | None = None,
    gate_entropy: float | None = None,
    top_k: int | None = None,
    teacher: Path | None = None,
    teacher_weight: float | None = None,
    teacher_cache: Path | None = None,
    config: Path | None = None,
    settings: Mapping[str, object] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    zero: int | None = None,
    recompute: bool = False,
    seed: int | None = None,
    bos: str | None = None,
    valid_fraction: float | None = None,
    valid_samples: int | None = None,
    near_duplicates: str | None = None,
    eval_every: int | None = None,
    save_every: int | None = None,
    keep: int | None = None,
    resume: bool = False,
    force: bool = False,
    stop_after: int | None = None,
    dry_run: bool = False,
    plan_for: int | None = None,
    on_step: Step | None = None,
) -> Report:
    """Train a model on text.

    `on_step` receives the record of every step, as in metrics.jsonl. When it returns False, raises, or Ctrl-C comes, the run
    saves a checkpoint and ends; `resume=True` continues it.
    """
    return _command("train", locals(), model, on_step=on_step)


def evaluate(
    model: Path,
    *,
    data: Paths | None = None,
    mixture: Path | None = None,
    cache: Path | None = None,
    doc_separator: str | None = None,
    text_column: str | None = None,
    perplexity: str | Iterable[str] | None = None,
    seq: int | None = None,
    stride: int | None = None,
    bos: str | None = None,
    threshold: float | None = None,
    active: float | None = None,
    router: str | None = None,
    against: Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    limit_tokens: int | None = None,
    tasks: str | Iterable[str] | None = None,
    task_data: Path | None = None,
    task_file: Mapping[str, Path] | None = None,
    shots_file: Mapping[str, Path] | None = None,
    shots: int | None = None,
    profile: str | None = None,
    strict: bool = False,
    limit: int | None = None,
    world_seed: int | None = None,
    max_new_tokens: int | None = None,
    out: Path | None = None,
) -> Report:
    """Measure perplexity and active share on text (`data`), or score benchmarks (`tasks`)."""
    return _command("eval", locals(), model)


def export(
    model: Path,
    *,
    form: str,
    out: Path,
    dtype: str | None = None,
    fold: str | None = None,
    data: Paths | None = None,
    doc_separator: str | None = None,
    text_column: str | None = None,
    active: float | None = None,
    force: bool = False,
) -> Report:
    """Write a model for transformers (`form="hf"`), as a dense model, as GGUF, or in another precision."""
    return _command("export", locals(), model)


def init(
    *,
    out: Path,
    preset: str | None = None,
    config: Path | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    tokenizer: Path | None = None,
    max_shard_size: str | None = None,
    force: bool = False,
) -> Report:
    """Make a model with random weights."""
    return _command("init", locals())
