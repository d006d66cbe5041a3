"""The pairs of a run: written when their responses are there, read back for scoring and training."""

import collections
import dataclasses
from collections.abc import Sequence

from etils import epath

from spin_jax.data.pairs import Pair, read_model, read_sampled, whole_sequence, write_pairs_parquet
from spin_jax.data.sources import Example
from spin_jax.data.tokenize import Tokenised
from spin_jax.errors import UserError
from spin_jax.generation.response_files import Response, forget_parts
from spin_jax.runtime import multihost
from spin_jax.self_play.run import Run
from spin_jax.self_play.workdir import check_model


def write_responses(
    run: Run,
    directory: epath.Path,
    examples: Sequence[Example],
    responses: Sequence[Response],
    model: dict[str, str],
) -> None:
    """`pairs.parquet`, which takes the place of the parts: a row a response, those to one prompt together. `model`
    identifies who wrote them."""
    texts = [run.chat.codec.decode(response.tokens) for response in responses]
    asked = [example for example in examples for _ in range(run.config.generate.responses)]
    answered = [
        dataclasses.replace(example, generated=text, truncated=response.truncated)
        for example, text, response in zip(asked, texts, responses, strict=True)
    ]
    columns = {
        "generated_tokens": [response.tokens.tolist() for response in responses],
        "generated_logprobs": [response.logprobs.tolist() for response in responses],
        "held_out": [run.is_held_out(response.row) for response in responses],
    }
    write_pairs_parquet(directory / "pairs.parquet", answered, columns, model)
    forget_parts(directory)


def pairs_of(run: Run, t: int) -> tuple[list[Pair], list[Pair]]:
    """(train, held-out) pairs whose y' are the responses of iteration t."""
    if t not in run.pairs:
        path = run.iteration(t) / "generated" / "pairs.parquet"
        if multihost.on_process_zero(path.exists):
            complaint = f"{path} was written by another model than that in {run.start_of(t)}"
            check_model(
                read_model(path), run.store.identity_of(run.start_of(t)), complaint, f"delete {path.parent}, and go on"
            )
            sampled = read_sampled(path)
        elif t == 0 and run.train_examples[0].generated is not None:
            sampled = {e.row: [(e.generated or "", e.truncated)] for e in run.train_examples + run.held_out_examples}
        else:
            raise UserError(f"{path} is missing: run the generate stage of iteration {t} first")
        examples = run.train_examples + run.held_out_examples
        if absent := [example.row for example in examples if example.row not in sampled]:
            raise UserError(f"{path} has no response to row {absent[0]}: the data changed; give another --workdir")
        asked = [(example, response) for example in examples for response in sampled[example.row]]
        pairs = multihost.parallel_map(lambda one: run.pair(one[0], one[1], t), asked)
        trained = sum(len(sampled[example.row]) for example in run.train_examples)
        run.pairs[t] = pairs[:trained], pairs[trained:]
    return run.pairs[t]


def mixed_pairs(run: Run, t: int) -> list[Pair]:
    """The pairs that iteration t trains on: its own, then those of `config.spin.previous_iterations` before it."""
    oldest = max(0, t - run.config.spin.previous_iterations)
    return [pair for s in range(t, oldest - 1, -1) for pair in pairs_of(run, s)[0]]


def with_proto(run: Run, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with a third response, "proto": the one that theta_0 wrote to the same prompt, generated at iteration
    0. Of several to a prompt the k-th has theta_0's k-th; where those are fewer, from the first again."""
    protos, seen = collections.defaultdict(list), collections.Counter()
    for first in pairs_of(run, 0)[0]:
        protos[first.row].append(first)
    found = []
    for pair in pairs:
        of_row, number = protos[pair.row], seen[pair.row, pair.iteration]
        seen[pair.row, pair.iteration] += 1
        (_, proto), (_, truncated) = of_row[number % len(of_row)].responses, of_row[number % len(of_row)].truncated
        responses, ends = (*pair.responses, proto), (*pair.truncated, truncated)
        found.append(dataclasses.replace(pair, responses=responses, truncated=ends))
    return found


def sft_pairs(run: Run) -> list[Pair]:
    """The examples to train on as pairs without a generated response; `config.sft.loss_on` says what is learned."""
    pairs = [sft_pair(run, example) for example in run.train_examples]
    return [whole_sequence(pair) for pair in pairs] if run.config.sft.loss_on == "all" else pairs


def sft_pair(run: Run, example: Example, tokens: Tokenised | None = None) -> Pair:
    return run.pair(example, tokens=tokens)
