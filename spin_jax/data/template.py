"""A tokenizer's chat template, and what it writes around messages: found with probes, since no template tells."""

import dataclasses
import datetime
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from spin_jax.data.sources import Message
from spin_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words that no template has, and that none has a reason to change.
_WORDS = ("spinprobequestion", "spinprobeanswer", "spinprobeagain", "spinprobelast")
_PROBE = tuple({"role": role, "content": word} for role, word in zip(("user", "assistant") * 2, _WORDS, strict=True))
# What the clock of templates shows, whenever it is asked: it is the date that Llama 3.1 has where there is no clock.
_DATE = datetime.datetime(2024, 7, 26)
_DIRECTIVES = ("-d", "-m", "-H", "-I", "-M", "-S", "-j", *"aAbBcCdDeFgGhHIjmMpRrSTuUVwWxXyY")
# Jinja's own strftime_now in place of that of transformers. The line break is trimmed, so that nothing is added.
_STOPPED_CLOCK = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f"|replace('%{one}', '{_DATE.strftime(f'%{one}')}')" for one in _DIRECTIVES)
    + " }}{% endmacro %}\n"
)
_OTHER_TEMPLATE = "or set --config.data.template=paper"


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template and its habits.

    Attributes:
        tokenizer: renders it.
        source: in Jinja.
        asks: its generation prompt ends where an answer begins, but for spaces, which the model writes. Else the prompt
            is what stands before a probe answer.
        joins: spaces at the end of such a prompt make one token with the word after them, so they are the answer's.
        tail: what it writes after the last answer.
        closing: what it writes after an answer that the model wrote: it ends in `end`, or has more after it.
        end: the token that ends an answer; None if the template has none.
    """

    tokenizer: "PreTrainedTokenizerBase"
    source: str
    asks: bool = True
    joins: bool = False
    tail: str = ""
    closing: str = ""
    end: int | None = None

    def prompt(self, messages: Sequence[Message]) -> str:
        """What stands before the answer to `messages`.

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
                content = content.rpartition("</think>")[2]  # earlier thoughts are left out by design
            if content.strip() not in text:
                raise UserError(
                    f"the tokenizer's chat template leaves out or rewrites the text of the {role}'s turn: take such "
                    f"turns out of the data, give the tokenizer a template that keeps them, {_OTHER_TEMPLATE}"
                )
        return text

    def answer(self, messages: Sequence[Message], prompt: str) -> str:
        """What stands between `prompt` and the end of the last of `messages`: its text, with spaces around it.

        Raises:
            UserError: the template refuses the messages, or changes the prompt or the answer.
        """
        text = self.render(messages)
        if not text.startswith(prompt):  # Mistral's has the system's text in the last turn, if that is a user's
            prompt, text = self.prompt(_PROBE[:1]), self.render([_PROBE[0], messages[-1]])
        if not text.startswith(prompt):
            raise UserError(_rewrites("prompt once the answer is there, so it cannot be scored as it was asked"))
        answer = text[len(prompt) :]
        kept = answer.removesuffix(self.tail)
        if kept + self.tail != answer or kept.strip() != messages[-1]["content"].strip():
            raise UserError(_rewrites("answer, so it cannot be scored as the model would write it"))
        return kept

    def notes(self) -> list[str]:
        """What one should know of the template before a long run."""
        notes = []
        if self.source.startswith(_STOPPED_CLOCK):
            notes.append(f"the chat template writes the date, which is always {_DATE:%d %b %Y} here: no prompt changes")
        if self.end is None:
            notes.append(
                "the chat template writes no token after an answer, so real responses get the tokenizer's EOS, which "
                "this model may never write: see how many of its responses end"
            )
        return notes

    def render(self, messages: Sequence[Message], ask: bool = False) -> str:
        """The template's text for `messages`, with its generation prompt if it is to `ask`.

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
        except Exception as error:  # a template is a program
            what = f"fails: {type(error).__name__}: {error}"
        raise UserError(" ".join(f"the tokenizer's chat template {what}".split()))


def probe(tokenizer: "PreTrainedTokenizerBase", own: Collection[int]) -> tuple[Template, list[int]]:
    """The tokenizer's chat template with its habits, and the added tokens that it writes around turns.

    Args:
        own: ids at which the model stops.

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
    # Several turns, if the template takes them: what follows an answer there is what the model writes.
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
    """The template that transformers takes, with its clock stopped: a run that goes on tomorrow asks the same."""
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
    source = source.removeprefix("\ufeff")  # a file's byte-order mark is no text of the template
    return _STOPPED_CLOCK + source if "strftime_now" in source else source


def _boundary(template: Template, before: str, tail: str) -> tuple[bool, bool]:
    """(`asks`, `joins`) of a template that writes `before` before an answer to the first probe."""
    asked = template.render(_PROBE[:1], ask=True)
    if before.startswith(asked) and not before[len(asked) :].strip(" "):
        return True, False
    alone = template.render(_PROBE[:1])
    if not before.startswith((alone, alone.removesuffix(tail))):
        raise UserError(_rewrites("prompt once the answer is there, so it cannot be scored as it was asked"))
    start, ids = (template.tokenizer(text, add_special_tokens=False).input_ids for text in (before, before + _WORDS[1]))
    return False, ids[: len(start)] != start


def _several(template: Template) -> list[str] | None:
    """What stands before a first question, before its answer, and before the next question."""
    try:
        found = _between(template.render(_PROBE), *_WORDS)
    except UserError:
        return None
    return found and found[:3]


def _end(opening: Sequence[int], turn: Sequence[int], tail: Sequence[int], own: Collection[int]) -> int | None:
    """The token that ends an answer, given those that stand before the first question, those after an answer in the
    middle and those after the last one. In the middle the first is it, unless it opens the next turn, as it opened the
    first one."""
    opener = next((token for token in opening if token in turn), None)
    if turn and (turn[0] != opener or turn[0] in own or turn[:1] == tail[:1]):
        return turn[0]
    return tail[0] if tail else None


def _names(tokenizer: "PreTrainedTokenizerBase", own: Collection[int]) -> dict[str, int]:
    """Tokens that a template may write to tell turns apart, by name: all that were added, and `own`."""
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    names = {str(tokenizer.decode([i])): i for i in own} | added
    return {name: i for name, i in names.items() if name and (i in own or not name.isspace())}


def _occurring(names: Mapping[str, int], text: str) -> list[int]:
    """Ids of the names in a text, in order."""
    longest_first = sorted(names, key=len, reverse=True)  # as tokenizers choose
    return [names[name] for name in re.findall("|".join(map(re.escape, longest_first)), text)] if names else []


def _between(text: str, *words: str) -> list[str] | None:
    """The parts of a text before, between and after `words`; None if they are not there in this order."""
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
