"""Models in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _native


class Model(_native.Model):
    """A model in memory, with its tokenizer; `load` makes it. Arrays that it returns outlive it."""

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        bos: str = "auto",
        ignore_eos: bool = False,
        on_text: Callable[[str], object] | None = None,
    ) -> dict[str, Any]:
        """Continue a prompt and return the report of `dsmoe generate`, with the new text as `text`.

        `on_text` receives new text as it comes; the text ends when it returns False.
        """
        asked = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
            "stop": list(stop),
            "bos": bos,
            "ignore_eos": ignore_eos,
        }
        report: dict[str, Any] = json.loads(self.continue_json(asked, on_text))
        return report

    def evaluate(
        self,
        ids: npt.NDArray[np.integer[Any]] | Sequence[int],
        *,
        seq: int | None = None,
        stride: int | None = None,
    ) -> dict[str, Any]:
        """Measure the perplexity of tokens, all of one text, and return the report of `dsmoe eval` about it."""
        report: dict[str, Any] = json.loads(self.evaluate_json(ids, seq, stride))
        return report


def load(
    model: str | PathLike[str],
    *,
    dtype: str | None = None,
    device: str = "cpu",
    threshold: float | None = None,
    active: float | None = None,
) -> Model:
    """Load the model of a directory or of a GGUF file.

    `dtype` is f32 or bf16, by default that of the stored weights. `threshold` or `active` choose the gates that open, as in
    `dsmoe generate`.
    """
    return Model(model, dtype=dtype, device=device, threshold=threshold, active=active)
