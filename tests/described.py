"""Devices that are not there, for the tests of those who choose by them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Described:
    """What `jax.Device` says of itself."""

    platform: str
    device_kind: str
    bytes_limit: int | None = None
    compute_capability: str = ""

    def memory_stats(self) -> dict | None:
        return {"bytes_limit": self.bytes_limit} if self.bytes_limit else None
