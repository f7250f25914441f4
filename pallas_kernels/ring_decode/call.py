"""What a backend is handed."""

from __future__ import annotations

from typing import Any, NamedTuple

from pallas_kernels.flash.rule import Rule


class Call(NamedTuple):
    """The static part of a call. Hashable.

    Attributes:
        rule: which keys a query sees; its window is not None.
        block_size: slots that a kernel takes at a time; None: from its table.
        interpret: parameters of Pallas' interpret mode; None: compiled.
    """

    rule: Rule
    block_size: int | None
    interpret: Any = None
