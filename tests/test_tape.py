"""The tape by itself: what it holds between the passes, and how contributions to one gradient are
added up.
"""

import weakref

import numpy as np

from lycoris_cupy import ops
from lycoris_cupy.tape import Deferred, Fresh, Tape, total_of


class Asked:
    """A deferred contribution that says what it was given."""

    def __init__(self, value: float, **of):
        self.value, self.given = value, []
        self.part = Deferred(self.run, **of)

    def run(self, add, term, spend):
        self.given.append((None if add is None else float(add[0]), term, spend))
        return np.full(1, (0 if add is None else add[0]) + self.value)


def total(*parts) -> float:
    return float(total_of(list(parts), np.dtype(np.float64))[0])


def test_only_what_nobody_else_holds_is_spent():
    one, two = np.full(1, 1.0), np.full(1, 2.0)
    for ready, spend in (
        ([one], False),
        ([Fresh(one)], True),
        ([one, two], True),
        ([np.full(1, 1, np.float32)], True),  # rounded to the dtype of its variable on the way
        ([], False),
    ):
        asked = Asked(4.0)
        assert total(*ready, asked.part) == 4 + sum(float(getattr(r, "array", r)[0]) for r in ready)
        assert [given[2] for given in asked.given] == [spend]
    assert (one[0], two[0]) == (1, 2)


def test_a_deferred_sum_is_spent_by_the_next_one():
    first, second = Asked(4.0), Asked(8.0)
    held = np.full(1, 1.0)
    assert total(first.part, held, second.part) == 13  # the last recorded one first
    assert second.given == [(1.0, None, False)] and first.given == [(9.0, None, True)]


def test_a_term_and_what_extends_it_are_one_sum():
    layer, adapter = Asked(4.0, extends=True), Asked(8.0, term="its term")
    assert total(layer.part, Fresh(np.full(1, 1.0)), adapter.part) == 5
    assert layer.given == [(1.0, "its term", True)] and adapter.given == []


def test_a_tape_holds_what_its_rules_need():
    """Of y = x @ w + (x @ down) @ up: x and x @ down, no output, and nothing once it is played."""
    rng, tape = np.random.default_rng(0), Tape()
    x = tape.watch(rng.standard_normal((5, 4)))
    w = rng.standard_normal((1, 4, 3))
    down, up = (tape.watch(rng.standard_normal(s)) for s in ((1, 4, 2), (1, 2, 3)))
    inner = ops.product(x, down)
    change = ops.product(inner, up)
    y = ops.product(x, w, add=change)
    refs = [weakref.ref(v.value) for v in (x, inner, change, y)]
    nodes, end, g = [v.node for v in (x, down, up)], y.node, np.ones(y.shape)
    del x, inner, change, y
    assert [ref() is None for ref in refs] == [False, False, True, True]
    dx, ddown, dup = tape.gradients(end, g, nodes)
    assert all(ref() is None for ref in refs) and (g == 1).all()
    assert [a.shape for a in (dx, ddown, dup)] == [(5, 4), (1, 4, 2), (1, 2, 3)]
