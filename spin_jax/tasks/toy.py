"""The quickstart's task: a data distribution that is known exactly, so that a policy's distance to it is too.

A prompt is `length` different letters, and every choice of `take` of them in the prompt's order is equally right:

    x = "k c f a p d"      y = "c a d", or any other of the C(6, 3) = 20 subsequences, each with p_data(y|x) = 1/20

All that the data distribution can say to a prompt is a short list, so no sampling is needed to measure a policy.
Everything else treats the task as any data set: a JSONL file, a chat template, a Hugging Face directory.
"""

import dataclasses
import itertools
import json
import math
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from spin_jax.config import ToyConfig
from spin_jax.data.sources import Example
from spin_jax.errors import UserError
from spin_jax.runtime.files import write_whole

if TYPE_CHECKING:
    from spin_jax.models import ModelConfig

SPECIAL_TOKENS = ("<pad>", "</s>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '<user> ' + message.content + ' ' }}"
    "{% else %}{{ '<assistant> ' + message.content + ' </s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
HEAD_DIM = 8


@dataclasses.dataclass(frozen=True)
class Task:
    """Which letters, how many a prompt, how many a response.

    Attributes:
        letters: the alphabet; one token each.
        length: different letters in a prompt.
        take: letters in a response.
    """

    letters: str = string.ascii_lowercase[:16]
    length: int = 6
    take: int = 3

    def num_prompts(self) -> int:
        """How many prompts there are in all."""
        return math.perm(len(self.letters), self.length)


TASK = Task()


def support(prompt: str, task: Task = TASK) -> list[tuple[str, float]]:
    """Every y with p_data(y|x) > 0 and that probability, for the prompt x.

    Raises:
        UserError: `prompt` is not `task.length` different letters with spaces between them.
    """
    letters = prompt.split()
    if len(set(letters)) != len(letters) or len(letters) != task.length or not set(letters) <= set(task.letters):
        raise UserError(f"{prompt!r} is no prompt of this task: give {task.length} different letters of {task.letters}")
    responses = [" ".join(chosen) for chosen in itertools.combinations(letters, task.take)]
    return [(response, 1 / len(responses)) for response in responses]


def make_examples(seed: int, train_rows: int, eval_prompts: int, task: Task = TASK) -> tuple[list[Example], list[str]]:
    """(SFT examples, one y ~ p_data a prompt; unseen prompts). All prompts differ; a function of the arguments alone.

    Raises:
        UserError: the task has fewer prompts than that.
    """
    wanted = train_rows + eval_prompts
    if 2 * wanted > task.num_prompts():  # beyond half of them, drawing until a prompt is new becomes slow
        raise UserError(
            f"--config.toy.train_rows={train_rows} and --config.toy.eval_prompts={eval_prompts} ask for too many of "
            f"the task's {task.num_prompts():,} prompts: together at most {task.num_prompts() // 2:,}"
        )
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}  # a set that keeps its order
    while len(prompts) < wanted:
        prompts[" ".join(rng.choice(list(task.letters), task.length, replace=False))] = None
    train, unseen = list(prompts)[:train_rows], list(prompts)[train_rows:]
    return [_example(row, prompt, _draw(rng, support(prompt, task))) for row, prompt in enumerate(train)], unseen


def exact_measures(
    logprobs: Callable[[Sequence[Example]], np.ndarray], prompts: Sequence[str], task: Task = TASK
) -> dict[str, float]:
    """How near a policy is to p_data, by summing over all of p_data's support: exact, no sampling.

        validity    mean over prompts of sum_y p_theta(y|x): the share of sampled responses that are right; at most 1
        kl_to_data  mean over prompts of sum_y p_data(y|x) (log p_data(y|x) - log p_theta(y|x)), in nats; at least 0

    Args:
        logprobs: examples -> summed log p_theta(response|prompt) of each, EOS included, in nats, [examples].
        prompts: prompts of the task.
    """
    rows, data_probs = [], []
    for prompt in prompts:
        for response, probability in support(prompt, task):
            rows.append(_example(len(rows), prompt, response))
            data_probs.append(probability)
    policy_logps = np.asarray(logprobs(rows), np.float64)
    data_probs = np.array(data_probs)
    return {
        "validity": float(np.exp(policy_logps).sum() / len(prompts)),
        "kl_to_data": float((data_probs * (np.log(data_probs) - policy_logps)).sum() / len(prompts)),
    }


def make_tokenizer(directory: epath.PathLike, task: Task = TASK) -> None:
    """Write a word-level tokenizer with a chat template, a letter a token, as transformers loads it."""
    import tokenizers
    import transformers

    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *task.letters])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=64,
    )
    tokenizer.save_pretrained(str(directory))


def prepare(directory: epath.PathLike, settings: ToyConfig, seed: int) -> tuple[str, str]:
    """(path of an untrained tiny Llama with its tokenizer, path of its SFT data), made under `directory` if not there.

    Args:
        settings: `config.toy`.
        seed: of the data and of the initial weights.

    Raises:
        UserError: a size in `settings` that the task or the model cannot have.
    """
    directory = epath.Path(directory)
    model, data = directory / "model", directory / "train.jsonl"
    if settings.hidden_size % HEAD_DIM:
        raise UserError(f"--config.toy.hidden_size={settings.hidden_size} must be a multiple of {HEAD_DIM}")
    made_with = json.dumps(dataclasses.asdict(settings) | {"seed": seed})
    note = directory / "made_with.json"
    if not note.exists() or note.read_text() != made_with:
        directory.rmtree(missing_ok=True)  # left by a run that was refused before it began
        write_whole(note, made_with)
    if not data.exists():
        examples, _ = make_examples(seed, settings.train_rows, settings.eval_prompts)
        rows = [{"messages": [*one.prompt, {"role": "assistant", "content": one.response}]} for one in examples]
        write_whole(data, "".join(json.dumps(row) + "\n" for row in rows))
    if not (model / "config.json").exists():
        make_tokenizer(model)
        _write_model(model, settings, seed)
    return str(model), str(data)


def model_config(settings: ToyConfig) -> "ModelConfig":
    """The tiny Llama of `config.toy`."""
    from spin_jax.models import ModelConfig

    heads = settings.hidden_size // HEAD_DIM
    return ModelConfig(
        model_type="llama",
        vocab_size=len(SPECIAL_TOKENS) + len(TASK.letters),
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        max_position_embeddings=64,
    )


def _write_model(directory: epath.Path, settings: ToyConfig, seed: int) -> None:
    import jax
    import jax.numpy as jnp

    from spin_jax import checkpoints, models

    config = model_config(settings)
    token_ids = {f"{name}_token_id": SPECIAL_TOKENS.index(token) for name, token in (("pad", "<pad>"), ("eos", "</s>"))}
    params = jax.jit(models.init_params, static_argnums=0)(config, jax.random.key(seed))
    checkpoints.save(directory, config, params, token_ids=token_ids, dtype=jnp.float32)


def _example(row: int, prompt: str, response: str) -> Example:
    return Example(row, ({"role": "user", "content": prompt},), response)


def _draw(rng: np.random.Generator, choices: list[tuple[str, float]]) -> str:
    return choices[rng.choice(len(choices), p=[probability for _, probability in choices])][0]
