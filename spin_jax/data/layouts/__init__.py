"""Where a row holds its conversation. A layout is one file, and one entry here; `config.data.layout` names it."""

from spin_jax.registry import Registry

# "auto" asks the last one first: the more specific it is, the further below.
LAYOUTS: Registry = Registry(
    {
        "preference": "spin_jax.data.layouts.preferences:preference",
        "prompt_response": "spin_jax.data.layouts.exchanges:prompt_response",
        "alpaca": "spin_jax.data.layouts.exchanges:alpaca",
        "conversations": "spin_jax.data.layouts.conversations:conversations",
        "messages": "spin_jax.data.layouts.conversations:messages",
        "pairs": "spin_jax.data.layouts.conversations:pairs",
    }
)
