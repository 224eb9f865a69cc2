"""Factor rules as Triton functions on masses [heads, groups]; their definitions are in reference.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def column(masses, kinds, kind):
    """Column `kind` of masses [HB, PB], as [HB]."""
    return tl.sum(tl.where((kinds == kind)[None, :], masses, 0.0), 1)


@triton.jit
def redistribute(masses, kinds, heads, arguments):
    """As `reference.redistribute`, head by head."""
    share = tl.load(arguments)
    least = tl.load(arguments + 1)
    keep = tl.load(arguments + 2)
    n_visual = tl.load(arguments + 3)
    n_sinks = tl.load(arguments + 4)
    plain = column(masses, kinds, 1)
    sink = column(masses, kinds, 2)
    text = column(masses, kinds, 3)
    visual = plain + sink
    possible = plain > tl.where(n_sinks > 0, 1e-6, float("inf"))
    chosen = (sink <= share * (visual + 1e-6 * n_visual)) & (visual >= least) & possible
    boost = 1 + (1 - keep) * (sink + text) / tl.maximum(plain, 1e-6)
    asked = tl.where((kinds == 1)[None, :], boost[:, None], tl.where((kinds >= 2)[None, :], keep, 1.0))
    return tl.where(chosen[:, None], asked, 1.0)


@triton.jit
def rank(mass, heads):
    """Rank of each head by mass, 0 the largest; equal heads in order of index."""
    ahead = (mass[None, :] > mass[:, None]) | ((mass[None, :] == mass[:, None]) & (heads[None, :] < heads[:, None]))
    return tl.sum(ahead.to(tl.int32), 1)


@triton.jit
def gaze(masses, kinds, heads, arguments):
    """As `reference.gaze`, over all heads of one query row."""
    count = tl.load(arguments)
    cap = tl.load(arguments + 1)
    visual = column(masses, kinds, 1)
    question = column(masses, kinds, 2)
    weighted = column(masses, kinds, 3)
    of_visual = rank(visual, heads) < count
    of_question = rank(question, heads) < count
    before = tl.sum(tl.where(of_visual, visual, 0.0), 0)
    after = tl.sum(tl.where(of_visual, weighted, 0.0), 0)
    gain = tl.minimum(tl.where(before > 0, after / tl.where(before > 0, before, 1.0), 1.0), cap)
    keep = tl.where(of_visual, 0.0, 1.0)
    lift = tl.where(of_question, gain, 1.0)
    total = column(masses, kinds, 0) + keep * visual + (1 - keep) * weighted + lift * question
    norm = tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 1.0)
    asked = tl.where((kinds == 1)[None, :], keep[:, None], tl.where((kinds == 2)[None, :], lift[:, None], 1.0))
    asked = tl.where((kinds == 3)[None, :], 1 - keep[:, None], asked)
    return asked * norm[:, None]


RULES = {"redistribute": redistribute, "gaze": gaze}
"""Every rule by name."""
