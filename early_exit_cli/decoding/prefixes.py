"""What earlier texts left, for those that begin with the same tokens: the turns of a conversation, a shared system prompt."""

from __future__ import annotations

from collections.abc import Sequence

from early_exit_cli.engine import Engine
from early_exit_cli.runtime.prefix import Prefix


class Prefixes:
    """The newest ones that fit into so many bytes; those used last stay longest.

    Only what has the bits that a prefill would compute is reused (`Blocks.shared_positions`), so an answer is the same with it
    and without.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.kept: list[Prefix] = []

    @property
    def bytes(self) -> int:
        """What they take."""
        return sum(prefix.bytes for prefix in self.kept)

    def best(self, engine: Engine, prompt_ids: list[int], exit_layers: Sequence[int]) -> tuple[Prefix | None, int]:
        """The one that saves a prompt the most, and how many positions it saves; None and 0 where none saves anything."""
        found, most = None, 0
        for prefix in self.kept:
            length = prefix.reusable(engine.blocks, prompt_ids, exit_layers)
            if length > most:
                found, most = prefix, length
        if found is not None:
            self.kept = [prefix for prefix in self.kept if prefix is not found] + [found]
        return found, most

    def keep(self, prefix: Prefix) -> None:
        """A further one, in the place of those that it continues; the ones unused for longest make room. One that saves nothing,
        or finds no room in all that there is, changes nothing.
        """
        tokens, layers = prefix.tokens, {*prefix.states}
        if not tokens or prefix.bytes > self.most_bytes:
            return
        self.kept = [
            old
            for old in self.kept
            if old.tokens != tokens[: len(old.tokens)]
            or not {*old.states} <= layers
            or old.prefilled > prefix.prefilled
        ]
        self.kept.append(prefix)
        while self.bytes > self.most_bytes:
            self.kept.pop(0)

    def clear(self) -> None:
        """Forget all."""
        self.kept = []
