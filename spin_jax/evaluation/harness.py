"""Answer the lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness) with `Scorer` and `Engine`.

All answers to a question are responses to one prompt, which is computed once. Questions share packed rows, and all
devices share the rows.

Text becomes token ids as in the harness's own `hf` model (`lm_eval.models.huggingface`), so that scores are comparable.
Question and answer are tokenised together, and the answer's ids are those after the question's. An empty question is
the tokenizer's BOS (else EOS). Text that is too long for the model loses its beginning.

`lm_eval.py` beside it has whole tasks asked. This module imports the harness, which the extra "eval" brings.
"""

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from spin_jax import models
from spin_jax.errors import UserError
from spin_jax.evaluation.loaded_model import LoadedModel
from spin_jax.evaluation.scoring import Scorer, check_finite

MAX_NEW_TOKENS = 256  # of an answer, where the task does not say: the `hf` model's own


class HarnessModel(TemplateLM):
    """A Hugging Face model, such as an iteration's. All processes are asked alike, and all answer.

    Args:
        loaded: its devices share the requests; its `config.seed` is what answers are sampled with, where a task asks
            for samples.
    """

    def __init__(self, loaded: LoadedModel):
        super().__init__()
        self.loaded, self.tokenizer = loaded, loaded.tokenizer
        self.scorer = Scorer(loaded.model, loaded.config.train, loaded.execution)
        # A question's answers follow each other. The cache holds no reference to the model, whose memory is needed.
        self._encode = functools.lru_cache(maxsize=4)(
            functools.partial(_encode, loaded.tokenizer, self.prefix_token_id)
        )

    # ---- what the harness asks of a model's text

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self.loaded.model.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Tokenise a text. Add the tokenizer's BOS, unless the text begins with it."""
        return list(self._encode(string, add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"{self.loaded.config.model.path}: the tokenizer has no chat template: leave --apply_chat_template "
                "out, or set chat_template in tokenizer_config.json"
            )
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)
        except jinja2.TemplateError:  # of a template that takes no system turn
            without_system = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(without_system, tokenize=False, **options)

    # ---- log-probs

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log p(continuation | context) in nats, whether greedy decoding would write it) for each request.

        Raises:
            UserError: a continuation is empty, or longer than the model reads.
        """
        if empty := [request for request in requests if not request.arguments[1]]:
            raise UserError(
                f"task {empty[0].task_name}: an answer to {_shown(empty[0].arguments[0])} is empty: mend the task"
            )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """`loglikelihood` of token ids. Score continuations of one context as responses to one prompt, as many as fit a
        packed row."""
        prompts, responses, places = [], [], []
        room: list[int] = []  # tokens that each prompt's row has left
        newest: dict[tuple[int, ...], int] = {}  # context -> the prompt that its next continuation goes to
        for text, context, continuation in requests:
            context = self._fit(text, context, continuation)
            number = newest.get(context)
            if number is None or room[number] < len(continuation):
                number = newest[context] = len(prompts)
                prompts.append(context)
                responses.append([])
                room.append(self.loaded.config.train.row_length - len(context))
            places.append((number, len(responses[number])))
            responses[number].append(continuation)
            room[number] -= len(continuation)
        scores = self.scorer.token_scores(self.loaded.params, prompts, responses, "log-likelihood")
        of_requests = [scores[prompt][response] for prompt, response in places]
        logps = np.array([one.logps.sum(dtype=np.float64) for one in of_requests])
        check_finite(logps[:, None], np.arange(len(logps)))
        return [(float(logp), bool(one.correct.all())) for logp, one in zip(logps, of_requests, strict=True)]

    def _fit(self, text: Any, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
        """Cut the beginning of a context so that a continuation fits. The model need not read the continuation's last
        token."""
        if not context or not continuation:
            raise UserError(f"{_shown(text)}: no token is left of the question or of its answer: mend the task")
        if len(continuation) > self.max_length:
            raise UserError(
                f"{_shown(text)}: an answer of {len(continuation)} tokens; the model reads {self.max_length} at most"
            )
        return tuple(context[-(self.max_length + 1 - len(continuation)) :])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log p(text) in nats for each request, in windows as long as the model reads."""
        windows = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text)
            of_text = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows.append([(text, *make_disjoint_window(window)) for window in of_text])
        scored = iter(self._loglikelihood_tokens(list(itertools.chain(*windows))))
        return [float(sum(logp for logp, _ in itertools.islice(scored, len(of_text)))) for of_text in windows]

    # ---- answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a text for each request (context, settings), cut before the first of the settings' stop strings.

        The text for request i depends on (weights, seed, i), as all responses do.

        Raises:
            UserError: a setting is not known, or leaves no room for the context.
        """
        alike: dict[str, list[int]] = {}  # settings -> the requests that have them
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.arguments[1], sort_keys=True), []).append(i)
        answers = {}
        for settings, numbers in alike.items():
            contexts = {i: self.tok_encode(requests[i].arguments[0]) for i in numbers}
            answers |= self._answers(contexts, sampling_fields(json.loads(settings)))
        return [answers[i] for i in range(len(requests))]

    def _answers(self, contexts: Mapping[int, list[int]], fields: Mapping[str, Any]) -> dict[int, str]:
        """Answer contexts of token ids, all with the same fields of `config.generate`."""
        stops, room = fields["stop_strings"], self.max_length - fields["max_new_tokens"]
        if room < 1:
            raise UserError(
                f"a task asks for answers of {fields['max_new_tokens']} tokens (max_gen_toks), and the model reads "
                f"{self.max_length} at most: lower it in the task"
            )
        prompts = {i: ids[-room:] or [self.prefix_token_id] for i, ids in contexts.items()}
        drawn = self.loaded.sample(prompts, **fields)
        ends = [*stops, self.tokenizer.decode(self.eot_token_id)]
        texts = {one.row: self.tokenizer.decode(one.tokens, skip_special_tokens=True) for one in drawn}
        return {row: postprocess_generated_text(text, ends, None) for row, text in texts.items()}

    def get_model_info(self) -> dict[str, object]:
        """Describe the model for the results file."""
        dtype = np.dtype(self.scorer.execution.dtype).name
        return {"model_num_parameters": models.num_params(self.loaded.model), "model_dtype": dtype}


def _encode(tokenizer: Any, prefix_id: int, text: str, add_special_tokens: bool | None) -> list[int]:
    if add_special_tokens is None:
        add_special_tokens = not has_bos_prefix(text, tokenizer.decode(prefix_id))
    return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids


_SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "min_new_tokens": int}  # and the kinds of their values


def sampling_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a task's `generation_kwargs` into fields of `config.generate`.

    Raises:
        UserError: one is unknown, and could change the answer.
    """
    known = normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS)
    stops = tuple(stop for stop in known.pop("until") if stop)
    fields: dict[str, Any] = {"max_new_tokens": known.pop("max_gen_toks"), "stop_strings": stops}
    sampled = known.pop("do_sample") and known.get("temperature", 0.0) > 0
    if known.get("num_beams") == 1:
        known.pop("num_beams")
    if unknown := known.keys() - _SAMPLING.keys():
        raise UserError(
            f"a task's generation_kwargs have {sorted(unknown)[0]}, which is not known here: they may have until, "
            f"max_gen_toks, do_sample, {', '.join(_SAMPLING)}"
        )
    fields |= {name: _SAMPLING[name](value) for name, value in known.items() if value is not None}
    return fields if sampled else fields | {"temperature": 0.0, "top_p": 1.0, "top_k": 0}


def _shown(text: Any) -> str:
    return repr(text if len(str(text)) < 80 else f"{str(text)[:40]}...{str(text)[-30:]}")
