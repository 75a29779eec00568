"""What a round costs one text: its share of a pass."""

from __future__ import annotations

from collections.abc import Callable

from early_exit_cli.runtime.blocks import LARGEST_WIDTH

NEED = 1.03
"""A draft must be expected to beat plain decoding by this factor: what the models of its worth leave out (exits come in
runs, they are taken as independent) is of this size, and ties should fall to the simpler side."""


def share_of_pass(pass_cost: Callable[[int], float], rows: int, batch_size: int) -> float:
    """Milliseconds of a pass that fall to one text with `rows` rows: an equal share of the pass in which every text has
    one row, and all that its further rows cost."""
    if batch_size == 1:
        return pass_cost(rows)
    everyone = pass_cost(batch_size)
    return everyone / batch_size + pass_cost(rows + batch_size - 1) - everyone


class PassShares:
    """`share_of_pass` by rows, worked out once for each batch size: drafting asks for it all the time.

    Args:
        pass_cost: rows -> milliseconds of a pass of the backbone over so many rows.
    """

    def __init__(self, pass_cost: Callable[[int], float]) -> None:
        self.pass_cost = pass_cost
        self.known: dict[int, list[float]] = {}

    def in_batch(self, batch_size: int) -> list[float]:
        """Milliseconds of 1 to LARGEST_WIDTH rows, each at its number."""
        if batch_size not in self.known:
            shares = [share_of_pass(self.pass_cost, rows, batch_size) for rows in range(1, LARGEST_WIDTH + 1)]
            self.known[batch_size] = [0.0, *shares]
        return self.known[batch_size]
