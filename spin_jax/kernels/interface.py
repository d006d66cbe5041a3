"""Define attention kernels, and choose the one for a device."""

import dataclasses
from collections.abc import Callable

import jax
from jax.typing import DTypeLike

from spin_jax.devices.accelerators import Device
from spin_jax.errors import UserError
from spin_jax.kernels import KERNELS
from spin_jax.registry import no_refusal


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Attention of packed rows that does not hold all scores of a row.

    Attributes:
        attention: (q [B, T, N, H], k and v [B, T, K, H], visible_until int32 [B, T], positions int32 [B, T], *,
            sliding_window: int or None, platform) -> [B, T, N, H] in q's dtype, differentiable in q, k and v:
            softmax(q k / sqrt(H)) v over what each token sees (`block_mask.causal_mask`). Each device calls it with its
            own rows and heads; `platform` is the devices', which need not be of the process that compiles for them.
        refusal: (device, head_dim, dtype of q, k and v) -> why it cannot run there, worded to follow
            "--config.model.attention=NAME"; None if it can.
        platforms: of "cpu", "gpu" and "tpu", those where "auto" takes it if it can run.
        row_length: length of packed rows that suits it, the default of `config.train.row_length`. Long rows are fuller,
            but attention costs more in them, unless the kernel skips tiles that no token sees.
    """

    attention: Callable[..., jax.Array]
    refusal: Callable[[Device, int, DTypeLike], str | None] = no_refusal
    platforms: tuple[str, ...] = ()
    row_length: int = 1024


def choose(asked: str, device: Device, head_dim: int, dtype: DTypeLike) -> str | None:
    """Return the name of the kernel that `config.model.attention` means on a device; None is plain jax.numpy.

    "auto" is plain if no kernel for the platform can run.

    Args:
        device: for which the program is compiled. The process need not have it.

    Raises:
        UserError: the config names a kernel that cannot run.
    """
    if asked == "plain":
        return None
    if asked == "auto":
        for name in reversed(KERNELS):
            kernel = KERNELS[name]
            if device.platform in kernel.platforms and not kernel.refusal(device, head_dim, dtype):
                return name
        return None
    if reason := KERNELS[asked].refusal(device, head_dim, dtype):
        raise UserError(f"--config.model.attention={asked} {reason}: write --config.model.attention=plain, or auto")
    return asked
