"""Base class of laws whose parameters a net computes from the context."""

from __future__ import annotations

from torch import Tensor, nn

from dflow.core import Context, Distribution, conditioned
from dflow.ops.precision import at_least_float32


class Conditional(Distribution):
    """A law whose parameters are the output of ``net``, called as in `dflow.core.conditioned`."""

    net: nn.Module

    def outputs(self, context: Context | None, *expected: int | None) -> Tensor:
        """The output of the net, at least float32.

        Raises:
            ValueError: no context, or a shape other than ``(batch, *expected)``; None is any size.
        """
        out: Tensor = conditioned(self.net, context)
        sizes = out.shape[1:]
        if len(sizes) != len(expected) or any(
            e not in (None, n) for e, n in zip(expected, sizes, strict=True)
        ):
            shape = ", ".join("any" if size is None else str(size) for size in expected)
            raise ValueError(f"the net gave params of shape {tuple(out.shape)}, expected (batch, {shape})")
        return at_least_float32(out)

    @property
    def num_calls(self) -> int:
        """One."""
        return 1


def check_rows(n: int, rows: int) -> None:
    """ValueError unless a context has a row for each of ``n`` draws."""
    if rows != n:
        raise ValueError(f"{n} draws from a context of {rows} rows; give a row for each draw")
