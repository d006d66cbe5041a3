"""Turn messages into token ids: the prompts that the opponent is asked with, and the sequences that are scored.

`chat_format` makes one of two formats with the same methods:

- "chat" (default): the tokenizer's own chat template, for generation and training. A sampled response is scored as the
  ids that were sampled. It is never decoded and tokenised again.
- "paper" (the released code of arXiv 2401.01335): an Alpaca-style prompt for generation, and Zephyr's template with an
  empty system turn for training. One deviation is on purpose: the released code ends every generated response with EOS,
  even a truncated one, and so teaches endings that nobody wrote. Here a truncated response has no end.

The tokenizer adds no special tokens: the template's text contains them all, as `apply_chat_template` assumes.
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
    """Turns messages into ids: int32 arrays of shape [tokens]. Prompts are messages as in `Example`.

    Each method raises UserError if the template refuses the messages, or an id is beyond the vocabulary.

    Attributes:
        name: "chat" or "paper".
        codec: tokenises text.
        stop_ids: sampling stops at the first of these, which is the response's last id.
    """

    name: ClassVar[str]
    codec: Codec
    stop_ids: tuple[int, ...]

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The codec's tokenizer."""
        return self.codec.tokenizer

    @abc.abstractmethod
    def generation_prompt(self, prompt: Sequence[Message]) -> np.ndarray:
        """Return the prompt that the opponent is asked with."""

    @abc.abstractmethod
    def training_prompt(self, prompt: Sequence[Message]) -> np.ndarray:
        """Return the prompt that precedes a response when policy and opponent are scored."""

    def real_response(self, prompt: Sequence[Message], text: str) -> np.ndarray:
        """Return the human response as a target, with its end."""
        return self.generated_response(prompt, text, truncated=False)

    @abc.abstractmethod
    def generated_response(
        self, prompt: Sequence[Message], response: Sequence[int] | np.ndarray | str, truncated: bool
    ) -> np.ndarray:
        """Return the opponent's response as a target, with an end unless it is `truncated`.

        Args:
            response: the sampled ids, the last a stop id unless `truncated`; or its text, if only that is known.

        Raises:
            ValueError: the ids end in a stop id although `truncated`, or do not although it is not.
        """

    def sampled_ids(self, prompt: Sequence[Message], text: str, truncated: bool) -> np.ndarray:
        """Return the ids that the opponent would have sampled for a text, the last a stop id unless `truncated`."""
        return self.generated_response(prompt, text, truncated)


def load_chat(
    directory: pathlib.Path,
    template: str,
    *,
    parse_special_tokens: bool = False,
    vocab_size: int | None = None,
) -> ChatFormat:
    """Make the chat format of the tokenizer in a model's directory. Arguments are those of `chat_format`.

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
    """Make the format called `template`, "chat" or "paper".

    Args:
        eos_ids: ids at which the model stops by its own files.
        parse_special_tokens: whether the name of a special token in a message becomes that token. Else it stays text.
        vocab_size: of the model; ids beyond it are refused.

    Raises:
        UserError: the tokenizer has no EOS or no usable chat template, or ids are beyond the vocabulary.
    """
    eos: Any = tokenizer.eos_token_id  # transformers gives it too wide a type
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
    """Refuse a format that cannot work with any data."""
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
    """The tokenizer's chat template, for generation and training.

    A response that is text is tokenised after its prompt, as SFT saw it and as the model writes it. Tokenised alone, it
    would get a space in front from SentencePiece that no sampled response has, and the policy could learn to tell the
    two players apart by that.
    """

    name: ClassVar[str] = "chat"
    habits: Template
    eos: int  # ends a response if the template writes no end

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
        # Cut after the first stop id, where sampling stops: text of the template after it ("\n") is never generated.
        stops = [position for position, token in enumerate(ids) if token in self.stop_ids]
        return _ids(ids[: stops[0] + 1] if stops else [*ids, self.eos])

    def _hidden(self, messages: Sequence[Message]) -> list[Message]:
        return [message | {"content": self.codec.hide(message["content"])} for message in messages]


@dataclasses.dataclass(frozen=True)
class PaperFormat(ChatFormat):
    r"""The released code's two templates (github.com/uclaml/SPIN); `</s>` stands for the tokenizer's EOS token.

    asked with   "### Instruction: {x}\n\n### Response: "
    scored with  "<|system|>\n</s>\n<|user|>\n{x}</s>\n<|assistant|>\n", then "{y}</s>\n</s>"

    As in the released collator, prompt and response are tokenised apart, and a generated response is decoded and
    tokenised again. So both players' responses are tokenised by the same rules.
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
    """A prompt and its responses, cut to their budgets, and which of them lost tokens."""

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    prompt_truncated: bool
    truncated: tuple[bool, ...]


def fit(prompt: np.ndarray, *responses: np.ndarray, max_length: int, max_prompt_length: int) -> Fitted:
    """Truncate to budgets in tokens, so that prompt <= max_prompt_length and prompt + response <= max_length.

    Keep the end of the prompt, which has the question and the assistant's header, and the start of each response. A
    truncated response loses its stop id, and gets no other.

    Raises:
        UserError: the budgets leave no room for a response.
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
