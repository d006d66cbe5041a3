"""The generate stage: y' ~ p_t(.|x) for every prompt."""

import logging

from spin_jax.generation.engine import generate, warn_if_endless
from spin_jax.generation.programs import make_sampler
from spin_jax.generation.response_files import Prompt, note_settings
from spin_jax.generation.stop_strings import stop_table
from spin_jax.runtime import multihost, out_of_memory
from spin_jax.self_play.pairs import write_responses
from spin_jax.self_play.run import Run

_LOG = logging.getLogger(__name__)


@out_of_memory.tells("generate", out_of_memory.for_sampling)
def generate_responses(run: Run, t: int) -> None:
    """y' ~ p_t(.|x) for every prompt, train and held-out: `generated/pairs.parquet`, in the authors' layout."""
    directory = run.iteration(t) / "generated"
    if multihost.on_first((directory / "pairs.parquet").exists):
        return
    examples = run.train_examples + run.held_out_examples
    if t == 0 and all(example.generated is not None for example in examples):
        _LOG.info("iteration 0 takes the generated responses that %s holds", run.config.data.train)
        return
    settings, model, codec = run.config.generate, run.store.identity_of(run.start_of(t)), run.chat.codec
    multihost.on_first(
        lambda: note_settings(directory, {f"model ({part})": content for part, content in model.items()})
    )
    stops_SV = stop_table(codec.tokenizer, settings.stop_strings, run.model.vocab_size, codec.silent)
    responses = generate(
        make_sampler(run.model, settings, run.chat.stop_ids, run.decode, stops_SV),
        run.store.params(run.start_of(t)),
        [Prompt(e.row, run.asked(e.row), n) for e in examples for n in range(settings.responses)],
        settings,
        seed=run.config.seed,
        iteration=t,
        mesh=run.decode.mesh,
        directory=directory,
        name=f"iteration {t}: generate",
    )
    multihost.on_first(lambda: write_responses(run, directory, examples, responses, model))
    if t == 0:
        multihost.on_first(lambda: warn_if_endless(responses, settings))
