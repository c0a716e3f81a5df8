"""The tokenizer of `vl2-nano`, learned from the questions and answers about drawn scenes.

    python -m vl2_jax.scenes.tokenizer DIRECTORY      writes config.json, processor_config.json, tokenizer*.json

Bytes and merges; digits stand alone, as in the released tokenizers, and so do the capitals that printed words are
written in, so that reading is spelling.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from convert.random_checkpoint import write_small_files
from vl2_jax.config import read_preset
from vl2_jax.scenes.conversations import SceneSizes, scene_conversation

_PIECES = r" ?\p{Lu}?\p{Ll}+|\p{N}|, |[^\s\p{L}\p{N}]+|\p{L}|\s"
_PRINTED = re.compile(r"\b[A-Z]{2,}\b")
_CONVERSATIONS, _SEED, _SIZES = 4000, 7, SceneSizes(turns=20, longest_side=112)


def learn(first_special: int) -> dict:
    """A `tokenizer.json` with `first_special` text tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=first_special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    return json.loads(tokenizer.to_str())


def _texts() -> Iterator[str]:
    for number in range(_CONVERSATIONS):
        for message in scene_conversation((_SEED, number), _SIZES)["messages"]:
            yield _PRINTED.sub("", message["content"].replace("<image>\n", ""))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    tables = read_preset("vl2-nano")
    write_small_files(tables, Path(sys.argv[1]), learn(min(tables["tokens"].values())))
