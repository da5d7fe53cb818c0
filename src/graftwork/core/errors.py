"""The one error of the library: what was asked, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraftError(ValueError):
    """Raised at the public boundary. The model, the files and the memory are as they were before the call.

    asked: what the caller wanted;  found: what stands in the way;  do: the way out.
    """

    def __init__(self, asked: str, found: str, do: str = "") -> None:
        self.asked, self.found, self.do = asked, found, do
        super().__init__("\n".join([asked, f"  found: {found}"] + ([f"  do: {do}"] if do else [])))

    def __reduce__(self) -> tuple[type[GraftError], tuple[str, str, str]]:
        return type(self), (self.asked, self.found, self.do)


# what other libraries and papers call our hyper-parameters
ALSO_CALLED = {
    "rank": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "target_modules": "at",
    "targets": "at",
    "layers_to_transform": "layers",
    "reduction_factor": "reduction",
    "bottleneck": "d",
    "non_linearity": "act",
    "num_virtual_tokens": "length",
    "prefix_length": "length",
}


def nearest(word: str, known: Iterable[str]) -> str:
    """The closest known word as a question, e.g. " (did you mean 'alpha'?)", or the empty text."""
    words = list(known)
    also = ALSO_CALLED.get(word)
    close = [also] if also in words else difflib.get_close_matches(word, words, n=5, cutoff=0.5)
    close.sort(key=lambda w: sorted(w) != sorted(word))  # the same letters in another order are a slip of the fingers
    return f" (did you mean {close[0]!r}?)" if close else ""
