"""Messages to token ids: what the opponent is asked with, and what both models are scored on.

`chat_format` gives one of two formats with the same four methods:

- "chat" (default): the tokenizer's own chat template, for generation and training alike. A sampled response is scored
  as the very ids that were sampled; it is never decoded and tokenised again.
- "paper" (the released code of arXiv 2401.01335): an Alpaca-style prompt for generation, the Zephyr template with an
  empty system turn for training. One deviation, on purpose: the released code ends every generated response with EOS,
  even one that was cut at the sampling budget, so that the policy is taught endings nobody wrote. Here a cut response
  has no end.

The tokenizer never adds special tokens of its own: a template's text has them all, as `apply_chat_template` assumes.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from spin_jax.data.sources import Message
from spin_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatFormat(Protocol):
    """How messages become ids: int32 arrays of shape [tokens]. Prompts are messages as in `Example`."""

    stop_ids: tuple[int, ...]  # sampling stops at any of these, and keeps it as the response's last id

    def generation_prompt(self, prompt: Sequence[Message]) -> np.ndarray:
        """What the opponent is asked with."""

    def training_prompt(self, prompt: Sequence[Message]) -> np.ndarray:
        """What precedes a response when policy and opponent are scored."""

    def real_response(self, prompt: Sequence[Message], text: str) -> np.ndarray:
        """The human response as a target, with its end."""

    def generated_response(
        self, prompt: Sequence[Message], response: Sequence[int] | np.ndarray | str, finished: bool
    ) -> np.ndarray:
        """The opponent's response as a target, with an end only if it is `finished`.

        `response` holds the sampled ids (the stop id last if finished), or the text where a pairs file has only that.
        Raises ValueError if ids and `finished` disagree.
        """


def chat_format(
    tokenizer: "PreTrainedTokenizerBase", template: str = "chat", eos_ids: Iterable[int] = ()
) -> ChatFormat:
    """The format called `template` ("chat" or "paper"); `eos_ids` are further stop ids, from generation_config.json.

    Raises:
        UserError: the tokenizer has no EOS, or no usable chat template.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token: set one in tokenizer_config.json, so that responses can end")
    if template == "paper":
        return PaperFormat(tokenizer, _unique([tokenizer.eos_token_id, *eos_ids]))
    if template != "chat":
        raise UserError(f"unknown data.template {template!r}: write 'chat' or 'paper'")
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template: put a chat_template in its tokenizer_config.json, or set"
            " data.template=paper"
        )
    end = _end_of_turn(tokenizer)
    specials = [i for i in _encode(tokenizer, end) if i in set(tokenizer.all_special_ids)]
    return TemplateFormat(tokenizer, _unique([tokenizer.eos_token_id, *eos_ids, *specials[:1]]), end)


def load_chat(directory: pathlib.Path, template: str) -> ChatFormat:
    """The chat format of the tokenizer in a model's directory.

    Raises:
        UserError: there is no tokenizer, or it has no EOS or chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: no tokenizer can be loaded ({str(error).splitlines()[0]})") from None
    return chat_format(tokenizer, template, _eos_ids(directory))


def _eos_ids(directory: pathlib.Path) -> tuple[int, ...]:
    """The model's own stop ids, from generation_config.json, where it has one."""
    path = directory / "generation_config.json"
    eos = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


@dataclasses.dataclass(frozen=True)
class TemplateFormat:
    """The tokenizer's chat template for generation and training alike.

    A response in text is tokenised as it stands after its prompt, which is how SFT saw it and how the model writes it.
    Alone, a SentencePiece tokenizer would put a space in front of it that no sampled response has, and the two players
    could be told apart by that.
    """

    tokenizer: "PreTrainedTokenizerBase"
    stop_ids: tuple[int, ...]
    end_of_turn: str  # what the template puts after a response, "<|im_end|>\n" for instance

    def generation_prompt(self, prompt: Sequence[Message]) -> np.ndarray:
        return _ids(_encode(self.tokenizer, _render(self.tokenizer, prompt, ask=True)))

    def training_prompt(self, prompt: Sequence[Message]) -> np.ndarray:
        return self.generation_prompt(prompt)

    def real_response(self, prompt: Sequence[Message], text: str) -> np.ndarray:
        return self._text_response(prompt, text, finished=True)

    def generated_response(
        self, prompt: Sequence[Message], response: Sequence[int] | np.ndarray | str, finished: bool
    ) -> np.ndarray:
        if isinstance(response, str):
            return self._text_response(prompt, response, finished)
        _check_end(response, finished, self.stop_ids)
        return _ids(response)

    def _text_response(self, prompt: Sequence[Message], text: str, finished: bool) -> np.ndarray:
        asked = _render(self.tokenizer, prompt, ask=True)
        answered = _render(self.tokenizer, [*prompt, {"role": "assistant", "content": text}], ask=False)
        if not answered.startswith(asked):
            raise UserError(
                "the tokenizer's chat template rewrites the prompt once the answer is there, so it cannot be scored as"
                " it was asked: give the tokenizer a template whose text only grows, or set data.template=paper"
            )
        answer = answered[len(asked) :]
        if not finished:
            return _ids(_encode_after(self.tokenizer, asked, answer.removesuffix(self.end_of_turn)))
        ids = _encode_after(self.tokenizer, asked, answer)
        # Sampling stops at the first stop id, so what a template writes after it ("\n") could never be generated.
        stops = [position for position, token in enumerate(ids) if token in self.stop_ids]
        return _ids(ids[: stops[0] + 1] if stops else [*ids, self.tokenizer.eos_token_id])


@dataclasses.dataclass(frozen=True)
class PaperFormat:
    r"""The released code's two templates (github.com/uclaml/SPIN); `</s>` stands for the tokenizer's EOS token.

    asked with   "### Instruction: {x}\n\n### Response: "
    scored with  "<|system|>\n</s>\n<|user|>\n{x}</s>\n<|assistant|>\n", then "{y}</s>\n</s>"

    As in the released collator, prompt and response are tokenised apart, and the generated response is decoded and
    tokenised again, which gives both players' responses the same first token rules.
    """

    tokenizer: "PreTrainedTokenizerBase"
    stop_ids: tuple[int, ...]

    def generation_prompt(self, prompt: Sequence[Message]) -> np.ndarray:
        return _ids(_encode(self.tokenizer, f"### Instruction: {_single_turn(prompt)}\n\n### Response: "))

    def training_prompt(self, prompt: Sequence[Message]) -> np.ndarray:
        eos = self.tokenizer.eos_token
        text = f"<|system|>\n{eos}\n<|user|>\n{_single_turn(prompt)}{eos}\n<|assistant|>\n"
        return _ids(_encode(self.tokenizer, text))

    def real_response(self, prompt: Sequence[Message], text: str) -> np.ndarray:
        return self.generated_response(prompt, text, finished=True)

    def generated_response(
        self, prompt: Sequence[Message], response: Sequence[int] | np.ndarray | str, finished: bool
    ) -> np.ndarray:
        if not isinstance(response, str):
            _check_end(response, finished, self.stop_ids)
            response = self.tokenizer.decode(response, skip_special_tokens=True)
        if not finished:
            return _ids(_encode(self.tokenizer, response))
        return _ids([*_encode(self.tokenizer, f"{response}{self.tokenizer.eos_token}\n"), self.tokenizer.eos_token_id])


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A prompt and its responses within their budgets, and which of them lost tokens."""

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    prompt_cut: bool
    cut: tuple[bool, ...]


def fit(prompt: np.ndarray, *responses: np.ndarray, max_length: int, max_prompt_length: int) -> Fitted:
    """Cut to a budget in tokens, so that prompt <= max_prompt_length and prompt + response <= max_length.

    The end of the prompt is kept, where the question and the assistant's header are, and the start of each response. A
    response that is cut loses its stop id and gets no other.
    """
    if not 0 < max_prompt_length < max_length:
        raise UserError(f"max_prompt_length ({max_prompt_length}) must be positive and below max_length ({max_length})")
    kept = prompt[-max_prompt_length:]
    room = max_length - len(kept)
    cut = tuple(len(response) > room for response in responses)
    return Fitted(kept, tuple(response[:room] for response in responses), len(prompt) > max_prompt_length, cut)


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], ask: bool) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    except jinja2.TemplateError as error:  # templates refuse roles and orders through raise_exception
        raise UserError(f"the tokenizer's chat template refuses these messages: {error}") from None


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What the template writes after a response, found with a response that no template contains."""
    probe = "spinprobe"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": probe}]
    text = _render(tokenizer, messages, ask=False)
    if probe not in text:
        raise UserError("the tokenizer's chat template leaves the assistant's message out: give it one that keeps it")
    return text.rpartition(probe)[2]


@functools.lru_cache(maxsize=1)  # a row's prompt is asked for three times in a row: to ask, to score, to stand before
def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    # verbose=False: a text longer than the model's window is no news here, `fit` cuts it.
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _encode_after(tokenizer: "PreTrainedTokenizerBase", before: str, text: str) -> list[int]:
    """Ids of `text` as it stands after `before`; if a token would straddle the two, which no model asked with `before`
    could write, then of `text` alone."""
    before_ids = _encode(tokenizer, before)
    ids = _encode(tokenizer, before + text)
    return ids[len(before_ids) :] if ids[: len(before_ids)] == before_ids else _encode(tokenizer, text)


def _single_turn(prompt: Sequence[Message]) -> str:
    if [message["role"] for message in prompt] != ["user"]:
        raise UserError(
            "the paper's templates take one user turn and no system turn: set data.turn=first, or data.template=chat"
        )
    return prompt[0]["content"]


def _check_end(ids: Sequence[int] | np.ndarray, finished: bool, stop_ids: Sequence[int]) -> None:
    ends = len(ids) > 0 and int(ids[-1]) in stop_ids
    if ends != finished:
        raise ValueError(f"finished={finished}, but the sampled ids {'end' if ends else 'do not end'} in a stop id")


def _ids(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(ids, np.int32)


def _unique(ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ids))
