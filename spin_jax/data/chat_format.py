"""Messages to token ids: what the opponent is asked with, and what both models are scored on.

`chat_format` gives one of two formats with the same four methods:

- "chat" (default): the tokenizer's own chat template, for generation and training alike. A sampled response is scored
  as the very ids that were sampled; it is never decoded and tokenised again.
- "paper" (the released code of arXiv 2401.01335): an Alpaca-style prompt for generation, the Zephyr template with an
  empty system turn for training. One deviation, on purpose: the released code ends every generated response with EOS,
  even a truncated one, so that the policy is taught endings nobody wrote. Here a truncated response has no end.

The tokenizer never adds special tokens of its own: a template's text has them all, as `apply_chat_template` assumes.
"""

import abc
import dataclasses
import logging
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from spin_jax.data.codec import Codec
from spin_jax.data.sources import Message
from spin_jax.data.template import Template, probe
from spin_jax.data.tokenizer import load_tokenizer, own_stop_ids, special_ids
from spin_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ChatFormat(abc.ABC):
    """How messages become ids: int32 arrays of shape [tokens]. Prompts are messages as in `Example`.

    Each method raises UserError where the template does not take the messages or an id is beyond the vocabulary.

    Attributes:
        name: "chat" or "paper".
        stop_ids: sampling stops at any of these, and keeps it as the response's last id.
    """

    name: ClassVar[str]
    codec: Codec
    stop_ids: tuple[int, ...]

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The codec's."""
        return self.codec.tokenizer

    @abc.abstractmethod
    def generation_prompt(self, prompt: Sequence[Message]) -> np.ndarray:
        """What the opponent is asked with."""

    @abc.abstractmethod
    def training_prompt(self, prompt: Sequence[Message]) -> np.ndarray:
        """What precedes a response when policy and opponent are scored."""

    def real_response(self, prompt: Sequence[Message], text: str) -> np.ndarray:
        """The human response as a target, with its end."""
        return self.generated_response(prompt, text, truncated=False)

    @abc.abstractmethod
    def generated_response(
        self, prompt: Sequence[Message], response: Sequence[int] | np.ndarray | str, truncated: bool
    ) -> np.ndarray:
        """The opponent's response as a target, with an end unless it is `truncated`.

        `response` holds the sampled ids, a stop id last unless truncated, or the text where a pairs file has only that.
        Raises ValueError if ids and `truncated` disagree.
        """

    def sampled_ids(self, prompt: Sequence[Message], text: str, truncated: bool) -> np.ndarray:
        """The ids that the opponent would have sampled for a text, a stop id last unless it is `truncated`."""
        return self.generated_response(prompt, text, truncated)


def load_chat(
    directory: pathlib.Path,
    template: str,
    *,
    parse_special_tokens: bool = False,
    vocab_size: int | None = None,
) -> ChatFormat:
    """The chat format of the tokenizer in a model's directory; `chat_format` has the arguments.

    Raises:
        UserError: there is no tokenizer, it has no EOS or usable chat template, or ids are beyond the vocabulary.
    """
    own, tokenizer = own_stop_ids(directory), load_tokenizer(directory)
    options = {"parse_special_tokens": parse_special_tokens, "vocab_size": vocab_size}
    try:
        chat = chat_format(tokenizer, template, own, **options)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    for note in chat.habits.notes() if isinstance(chat, TemplateFormat) else ():
        _LOG.warning("%s: %s", directory, note)
    return chat


def chat_format(
    tokenizer: "PreTrainedTokenizerBase",
    template: str = "chat",
    eos_ids: Iterable[int] = (),
    *,
    parse_special_tokens: bool = False,
    vocab_size: int | None = None,
) -> ChatFormat:
    """The format called `template`, "chat" or "paper".

    Args:
        eos_ids: ids at which the model stops by its own files.
        parse_special_tokens: whether the name of a special token in a message is that token; else it is text.
        vocab_size: of the model; an id beyond it is refused.

    Raises:
        UserError: the tokenizer has no EOS or no usable chat template, or ids are beyond the vocabulary.
    """
    eos: Any = tokenizer.eos_token_id  # which transformers types as more than it is
    eos_ids = list(eos_ids)
    stop_ids = _unique([*([] if eos is None else [eos]), *eos_ids])
    if not stop_ids or (eos is None and template == "paper"):
        raise UserError("the tokenizer has no eos_token: set one in tokenizer_config.json, so that responses can end")
    if template not in ("chat", "paper"):
        raise UserError(f"unknown data.template {template!r}: write 'chat' or 'paper'")
    habits, written = probe(tokenizer, stop_ids) if template == "chat" else (None, [])
    if habits and habits.end is not None:
        stop_ids = _unique([*stop_ids, habits.end])
    special, added = special_ids(tokenizer), tokenizer.added_tokens_decoder
    kept = frozenset(i for i in {*special, *stop_ids, *written} & added.keys() if not added[i].content.isspace())
    codec = Codec(tokenizer, frozenset() if parse_special_tokens else kept, special.union(stop_ids), vocab_size)
    codec.check(stop_ids)
    stops: Any = eos if eos in eos_ids or not eos_ids else eos_ids[0]
    chat = TemplateFormat(codec, stop_ids, habits, stops) if habits else PaperFormat(codec, stop_ids)
    _try(chat)
    return chat


def _try(chat: ChatFormat) -> None:
    """Refuse a format whose ids cannot be used, whatever the data."""
    question = [{"role": "user", "content": "question"}]
    chat.generation_prompt(question)
    chat.training_prompt(question)
    response = chat.real_response(question, "answer")
    if response[-1] not in chat.stop_ids:
        raise UserError("an answer does not end in any of the model's stop ids: mend the tokenizer's chat template")
    if len(response) == 1:
        raise UserError("the tokenizer makes no token of a word: its vocabulary is damaged; download it again")


@dataclasses.dataclass(frozen=True)
class TemplateFormat(ChatFormat):
    """The tokenizer's chat template for generation and training alike.

    A response in text is tokenised as it stands after its prompt, which is how SFT saw it and how the model writes it.
    Alone, a SentencePiece tokenizer would put a space in front of it that no sampled response has, and the two players
    could be told apart by that.
    """

    name: ClassVar[str] = "chat"
    habits: Template
    eos: int  # ends a response where the template writes no end

    def generation_prompt(self, prompt: Sequence[Message]) -> np.ndarray:
        return _ids(self.codec.encode(self.habits.prompt(self._hidden(prompt))))

    def training_prompt(self, prompt: Sequence[Message]) -> np.ndarray:
        return self.generation_prompt(prompt)

    def generated_response(
        self, prompt: Sequence[Message], response: Sequence[int] | np.ndarray | str, truncated: bool
    ) -> np.ndarray:
        if not isinstance(response, str):
            _check_end(response, truncated, self.stop_ids)
            return _ids(response)
        messages = self._hidden([*prompt, {"role": "assistant", "content": response}])
        asked = self.habits.prompt(messages[:-1])
        answer = self.habits.answer(messages, asked)
        if truncated:
            return _ids(self.codec.encode_after(asked, answer))
        ids = self.codec.encode_after(asked, answer + self.habits.closing)
        # Sampling stops at the first stop id, so what a template writes after it ("\n") could never be generated.
        stops = [position for position, token in enumerate(ids) if token in self.stop_ids]
        return _ids(ids[: stops[0] + 1] if stops else [*ids, self.eos])

    def _hidden(self, messages: Sequence[Message]) -> list[Message]:
        return [message | {"content": self.codec.hide(message["content"])} for message in messages]


@dataclasses.dataclass(frozen=True)
class PaperFormat(ChatFormat):
    r"""The released code's two templates (github.com/uclaml/SPIN); `</s>` stands for the tokenizer's EOS token.

    asked with   "### Instruction: {x}\n\n### Response: "
    scored with  "<|system|>\n</s>\n<|user|>\n{x}</s>\n<|assistant|>\n", then "{y}</s>\n</s>"

    As in the released collator, prompt and response are tokenised apart, and the generated response is decoded and
    tokenised again, which gives both players' responses the same first token rules.
    """

    name: ClassVar[str] = "paper"

    def generation_prompt(self, prompt: Sequence[Message]) -> np.ndarray:
        return _ids(self.codec.encode(self._asked(prompt)))

    def sampled_ids(self, prompt: Sequence[Message], text: str, truncated: bool) -> np.ndarray:
        ids = self.codec.encode_after(self._asked(prompt), self.codec.hide(text))
        return _ids(ids if truncated else [*ids, self.stop_ids[0]])

    def _asked(self, prompt: Sequence[Message]) -> str:
        return f"### Instruction: {self.codec.hide(_single_turn(prompt))}\n\n### Response: "

    def training_prompt(self, prompt: Sequence[Message]) -> np.ndarray:
        eos, question = self.tokenizer.eos_token, self.codec.hide(_single_turn(prompt))
        return _ids(self.codec.encode(f"<|system|>\n{eos}\n<|user|>\n{question}{eos}\n<|assistant|>\n"))

    def generated_response(
        self, prompt: Sequence[Message], response: Sequence[int] | np.ndarray | str, truncated: bool
    ) -> np.ndarray:
        if not isinstance(response, str):
            _check_end(response, truncated, self.stop_ids)
            response = self.codec.decode(response)
        text = self.codec.hide(response)
        if truncated:
            return _ids(self.codec.encode(text))
        eos: Any = self.tokenizer.eos_token_id
        return _ids([*self.codec.encode(f"{text}{self.tokenizer.eos_token}\n"), eos])


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A prompt and its responses within their budgets, and which of them lost tokens."""

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    prompt_truncated: bool
    truncated: tuple[bool, ...]


def fit(prompt: np.ndarray, *responses: np.ndarray, max_length: int, max_prompt_length: int) -> Fitted:
    """Truncate to a budget in tokens, so that prompt <= max_prompt_length and prompt + response <= max_length.

    The end of the prompt is kept, where the question and the assistant's header are, and the start of each response. A
    truncated response loses its stop id and gets no other.
    """
    if not 0 < max_prompt_length < max_length:
        raise UserError(f"max_prompt_length ({max_prompt_length}) must be positive and below max_length ({max_length})")
    kept = prompt[-max_prompt_length:]
    room = max_length - len(kept)
    fitted = tuple(response[:room] for response in responses)
    return Fitted(kept, fitted, len(prompt) > max_prompt_length, tuple(len(response) > room for response in responses))


def _single_turn(prompt: Sequence[Message]) -> str:
    roles = [message["role"] for message in prompt]
    if roles != ["user"]:
        one = "set --config.data.turn=first"
        advice = "put the system's text into the user's turn" if "system" in roles else one
        raise UserError(
            f"the paper's templates take one user turn and no system turn: {advice}, or set --config.data.template=chat"
        )
    return prompt[0]["content"]


def _check_end(ids: Sequence[int] | np.ndarray, truncated: bool, stop_ids: Sequence[int]) -> None:
    ends = len(ids) > 0 and int(ids[-1]) in stop_ids
    if ends == truncated:
        raise ValueError(f"truncated={truncated}, but the sampled ids {'end' if ends else 'do not end'} in a stop id")


def _ids(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(ids, np.int32)


def _unique(ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ids))
