"""Load the examples of a run: read them, tokenise them, and split them into training and held-out examples."""

import logging
from collections.abc import Mapping

from etils import epath

from spin_jax.config import Config
from spin_jax.data.chat_format import ChatFormat
from spin_jax.data.sources import Example, Examples, Skip, drawn, load_examples, split_examples
from spin_jax.data.tokenize import Tokenised, tokenise_once
from spin_jax.runtime import multihost

_LOG = logging.getLogger(__name__)


def load_dataset(
    config: Config, train: str, workdir: epath.Path, source: epath.Path, chat: ChatFormat
) -> tuple[list[Example], list[Example], dict[int, Tokenised]]:
    """Return (examples to train on, held-out examples, token ids of both by row). Every process reads all the text, and
    tokenises a share of it.

    Args:
        train: the data set's source, as `load_examples` takes it.
        workdir: keeps the token ids.
        source: directory of the tokenizer.

    Raises:
        UserError: the data cannot be read or used.
    """
    data = config.data
    found = multihost.on_each_process(
        lambda: load_examples(train, split=data.split, layout=data.layout, turn=data.turn)
    )
    found.log(train)
    # Tokenise in the order of drawing: once there are enough usable rows, the others need no tokens.
    order = drawn(found.examples, config.seed)
    cut = data.long_prompts == "keep_end"
    enough = data.eval_rows + data.max_rows if data.max_rows and cut else None
    made = tokenise_once(workdir / "tokens.npz", source, data.template, chat, order, enough)
    usable, tokens = Examples(), {}
    for example, ids in zip(order, made, strict=False):
        if isinstance(ids, Skip):
            usable.skipped.append(ids)
        elif not cut and ids.longest_prompt > data.max_prompt_length:
            usable.skipped.append(Skip(example.row, f"prompt longer than {data.max_prompt_length} tokens"))
        else:
            usable.examples.append(example)
            tokens[example.row] = ids
    if usable.skipped:
        usable.skipped.sort(key=lambda skip: skip.row)
        usable.log(train)
    usable.refuse_none(train)
    without = {skip.row for skip in usable.skipped}
    examples, held_out = split_examples(found.examples, data.eval_rows, config.seed, data.max_rows, without)
    if len(examples) < data.max_rows:
        _LOG.warning("--config.data.max_rows=%d: there are %d rows to train on", data.max_rows, len(examples))
    _tell_of_cut_prompts(train, tokens, data.max_prompt_length)
    return examples, held_out, tokens


def _tell_of_cut_prompts(train: str, tokens: Mapping[int, Tokenised], longest: int) -> None:
    cut = [row for row, ids in tokens.items() if ids.longest_prompt > longest]
    if cut:
        _LOG.warning(
            "%s: %d of %d prompts lose their beginning (BOS, a system turn), being longer than "
            "--config.data.max_prompt_length=%d, the first in row %d: raise it, or leave them out with "
            "--config.data.long_prompts=skip",
            *(train, len(cut), len(tokens), longest, min(cut)),
        )
