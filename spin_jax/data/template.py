"""Find out what a tokenizer's chat template writes around messages.

A template is a program: it does not say where a prompt ends, nor which token ends an answer. So render it with words
that occur nowhere else, the probes, and read what stands between them.
"""

import dataclasses
import datetime
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from spin_jax.data.sources import Message
from spin_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The probes: no template contains these words, and none has a reason to change them.
_WORDS = ("spinprobequestion", "spinprobeanswer", "spinprobeagain", "spinprobelast")
_PROBE = tuple({"role": role, "content": word} for role, word in zip(("user", "assistant") * 2, _WORDS, strict=True))
# Fix the date that templates write, or a run resumed tomorrow would send other prompts. Llama 3.1's template falls back
# to this date where there is no clock.
_DATE = datetime.datetime(2024, 7, 26)
_DIRECTIVES = ("-d", "-m", "-H", "-I", "-M", "-S", "-j", *"aAbBcCdDeFgGhHIjmMpRrSTuUVwWxXyY")
# Replace the strftime_now of transformers by a Jinja macro. Jinja trims the line break after it, so it adds no text.
_STOPPED_CLOCK = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f"|replace('%{one}', '{_DATE.strftime(f'%{one}')}')" for one in _DIRECTIVES)
    + " }}{% endmacro %}\n"
)
_OTHER_TEMPLATE = "or set --config.data.template=paper"


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template, and what the probes have shown of it.

    Attributes:
        tokenizer: renders the template.
        source: the template, in Jinja.
        asks: whether the template's own generation prompt ends where an answer begins. Spaces between the two may be
            missing: the model writes them. If it does not, take as the prompt what stands before a probe answer.
        joins: whether the tokenizer joins spaces at the end of such a prompt to the word after them. They then belong
            to the answer.
        tail: text that the template writes after the last answer.
        closing: text that follows an answer which the model wrote. It contains the token `end`, and maybe more.
        end: id of the token that ends an answer; None if the template writes none.
    """

    tokenizer: "PreTrainedTokenizerBase"
    source: str
    asks: bool = True
    joins: bool = False
    tail: str = ""
    closing: str = ""
    end: int | None = None

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text before the answer to `messages`.

        Raises:
            UserError: the template refuses the messages, or does not keep their text.
        """
        if self.asks:
            text = self.render(messages, ask=True)
        else:
            text = self.render([*messages, _PROBE[1]]).rpartition(_WORDS[1])[0]
            text = text.rstrip(" ") if self.joins else text
        for message in messages:
            content, role = message["content"], message["role"]
            if role == "assistant":
                content = content.rpartition("</think>")[2]  # templates leave out earlier thoughts by design
            if content.strip() not in text:
                raise UserError(
                    f"the tokenizer's chat template leaves out or rewrites the text of the {role}'s turn: take such "
                    f"turns out of the data, give the tokenizer a template that keeps them, {_OTHER_TEMPLATE}"
                )
        return text

    def answer(self, messages: Sequence[Message], prompt: str) -> str:
        """Return the last of `messages` as the template writes it after `prompt`: its text, perhaps with spaces around.

        Raises:
            UserError: the template refuses the messages, or changes the prompt or the answer.
        """
        text = self.render(messages)
        if not text.startswith(prompt):
            # Mistral's template writes the system's text into the last user turn, and leaves it out where the assistant
            # has answered. Compare with an exchange without a system turn.
            prompt, text = self.prompt(_PROBE[:1]), self.render([_PROBE[0], messages[-1]])
        if not text.startswith(prompt):
            raise UserError(_rewrites("prompt once the answer is there, so it cannot be scored as it was asked"))
        answer = text[len(prompt) :]
        kept = answer.removesuffix(self.tail)
        if kept + self.tail != answer or kept.strip() != messages[-1]["content"].strip():
            raise UserError(_rewrites("answer, so it cannot be scored as the model would write it"))
        return kept

    def notes(self) -> list[str]:
        """Return warnings about the template, for a user who begins a long run."""
        notes = []
        if self.source.startswith(_STOPPED_CLOCK):
            notes.append(
                f"the chat template writes the date, which is always {_DATE:%d %b %Y} here: prompts never change"
            )
        if self.end is None:
            notes.append(
                "the chat template writes no token after an answer, so real responses end in the tokenizer's EOS. This "
                "model may never write that token: watch the share of truncated responses"
            )
        return notes

    def render(self, messages: Sequence[Message], ask: bool = False) -> str:
        """Render `messages`, followed by the template's generation prompt if `ask`.

        Raises:
            UserError: the template refuses the messages, or fails.
        """
        import jinja2

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), chat_template=self.source, tokenize=False, add_generation_prompt=ask
                )
            )
        except jinja2.TemplateSyntaxError as error:
            what = f"is not Jinja: {error.message}"
        except jinja2.TemplateError as error:  # templates refuse roles and orders through raise_exception
            what = f"refuses these messages: {error}"
        except Exception as error:  # a template is a program: it can raise anything
            what = f"fails: {type(error).__name__}: {error}"
        raise UserError(" ".join(f"the tokenizer's chat template {what}".split()))


def probe(tokenizer: "PreTrainedTokenizerBase", own: Collection[int]) -> tuple[Template, list[int]]:
    """Probe the tokenizer's chat template.

    Args:
        own: ids at which the model stops by its own files.

    Returns:
        the template with what was found, and the ids of the added tokens that it writes around turns.

    Raises:
        UserError: there is no template, or it cannot be used; one line.
    """
    bare = Template(tokenizer, _source(tokenizer))
    try:
        found = _between(bare.render(_PROBE[:2]), *_WORDS[:2])
    except UserError as error:
        raise UserError(f"{error}; mend it, {_OTHER_TEMPLATE}") from None
    if found is None:
        raise UserError(
            "the tokenizer's chat template leaves the assistant's message out, or rewrites messages: give the "
            f"tokenizer one that keeps them, {_OTHER_TEMPLATE}"
        )
    start, header, tail = found
    asks, joins = _boundary(bare, start + _WORDS[0] + header, tail)
    # Look at a conversation of several turns if the template takes one: the model has learned to write what follows an
    # answer in its middle.
    opening, heading, turn = _several(bare) or found
    tokens = _names(tokenizer, own)
    in_opening, in_turn, in_tail = (_occurring(tokens, text) for text in (opening, turn, tail))
    end = _end(in_opening, in_turn, in_tail, own)
    closing = tail if end in (None, *in_tail[:1]) else turn
    return (
        dataclasses.replace(bare, asks=asks, joins=joins, tail=tail, closing=closing, end=end),
        [*in_opening, *_occurring(tokens, heading), *in_turn],
    )


def _source(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the template that transformers would take, with the date fixed."""
    known = tokenizer.chat_template
    if not known:
        raise UserError(
            f"the tokenizer has no chat template: put a chat_template in its tokenizer_config.json, {_OTHER_TEMPLATE}"
        )
    if isinstance(known, dict) and "default" not in known:
        raise UserError(
            f"of the tokenizer's chat templates ({', '.join(known)}) none is named default: name one of them so in "
            f"tokenizer_config.json, {_OTHER_TEMPLATE}"
        )
    source = known["default"] if isinstance(known, dict) else known
    if not isinstance(source, str):
        raise UserError(f"the tokenizer's chat_template is {source!r}: write a template in Jinja, {_OTHER_TEMPLATE}")
    source = source.removeprefix("\ufeff")  # a byte-order mark is not part of the template
    return _STOPPED_CLOCK + source if "strftime_now" in source else source


def _boundary(template: Template, before: str, tail: str) -> tuple[bool, bool]:
    """Return (`asks`, `joins`) of a template. `before` is what it writes before the answer to the first probe."""
    asked = template.render(_PROBE[:1], ask=True)
    if before.startswith(asked) and not before[len(asked) :].strip(" "):
        return True, False
    alone = template.render(_PROBE[:1])
    if not before.startswith((alone, alone.removesuffix(tail))):
        raise UserError(_rewrites("prompt once the answer is there, so it cannot be scored as it was asked"))
    start, ids = (template.tokenizer(text, add_special_tokens=False).input_ids for text in (before, before + _WORDS[1]))
    return False, ids[: len(start)] != start


def _several(template: Template) -> list[str] | None:
    """Return what stands before the first question, before its answer, and before the second question; None if the
    template does not take several turns."""
    try:
        found = _between(template.render(_PROBE), *_WORDS)
    except UserError:
        return None
    return found and found[:3]


def _end(opening: Sequence[int], turn: Sequence[int], tail: Sequence[int], own: Collection[int]) -> int | None:
    """Return the token that ends an answer; None if there is none.

    It is the first token after an answer in the middle of a conversation, unless that token opens the next turn. A
    token that opens turns stands before the first question, too.

    Args:
        opening: tokens before the first question.
        turn: tokens between an answer and the next question.
        tail: tokens after the last answer.
        own: ids at which the model stops by its own files.
    """
    opener = next((token for token in opening if token in turn), None)
    if turn and (turn[0] != opener or turn[0] in own or turn[:1] == tail[:1]):
        return turn[0]
    return tail[0] if tail else None


def _names(tokenizer: "PreTrainedTokenizerBase", own: Collection[int]) -> dict[str, int]:
    """Return {name: id} of the tokens that a template may write around turns: all added tokens, and `own`."""
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    names = {str(tokenizer.decode([i])): i for i in own} | added
    return {name: i for name, i in names.items() if name and (i in own or not name.isspace())}


def _occurring(names: Mapping[str, int], text: str) -> list[int]:
    """Return the ids of the names in a text, in order."""
    longest_first = sorted(names, key=len, reverse=True)  # tokenizers take the longest name that fits
    return [names[name] for name in re.findall("|".join(map(re.escape, longest_first)), text)] if names else []


def _between(text: str, *words: str) -> list[str] | None:
    """Return the parts of a text before, between and after `words`; None unless all occur, in this order."""
    parts = []
    for word in words:
        before, found, text = text.partition(word)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def _rewrites(what: str) -> str:
    return (
        f"the tokenizer's chat template rewrites the {what}: give the tokenizer a template whose text only grows, "
        f"{_OTHER_TEMPLATE}"
    )
