"""Beam search over the prefix trie: exact within its beams, batched over users, no loop over users or beams.

Shapes: ``U`` users, ``M`` beams, ``C`` code levels, ``W`` codebook width, ``N`` items, ``Q`` denied items of all users,
``E`` candidates of one user at one level.

One level goes from beams to candidates to beams. The beams of a user are distinct trie nodes of one level in ascending
order, so their children, laid end to end, are distinct nodes in ascending order too: that jagged row of candidates is
what is scored. Its padded width ``E`` is the number of children of the ``M`` nodes that have most: a host integer known
when the trie is built, never more than ``M * max_children``, itself never more than the ``M * W`` of a dense legal mask.
The last code level is followed by one more, from leaves to items, so that a shared ID expands to its items.

Every shape follows from the trie and ``M``; nothing is read back to the host between the first level and the last.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gbla_rec.semantic_ids.trie import PrefixTrie

NextLogProbs = Callable[[Tensor, Tensor], Tensor]
"""Prefixes ``(U, M_l, l)`` and parents ``(U, M_l)``, int64 -> fp32 log-probabilities ``(U, M_l, W_l)`` of the next code over its codebook.

``M_l <= M`` is the same for all users of a call and differs between levels; rows of dead beams hold code 0. A parent is the place, among
the beams of the call before, of the beam that a prefix prolongs by one code (of a dead beam: any place; in the first call: 0), so that a
model can keep what it computed for it."""


@dataclass(frozen=True, slots=True)
class BeamResult:
    """Ranked items of each user.

    Attributes:
        items: ``(U, num_results)`` int64, best first; -1 where a user has fewer legal items in the beams.
        scores: ``(U, num_results)`` fp32, the log-probability of the item's semantic ID; -inf where ``items`` is -1.
    """

    items: Tensor
    scores: Tensor


@torch.no_grad()
def constrained_beam_search(
    next_log_probs: NextLogProbs,
    trie: PrefixTrie,
    *,
    num_users: int,
    num_beams: int,
    num_results: int,
    denied_items: Tensor | None = None,
    denied_offsets: Tensor | None = None,
    device: torch.device | str | None = None,
    check_nan: bool = True,
) -> BeamResult:
    """The ``num_results`` best legal items of each user, by the log-probability of their semantic IDs.

    Scores are sums of raw log-probabilities: they are not renormalised over the legal codes. Ties are broken by the
    lexicographic order of the codes, then by ascending item index. With ``num_beams`` at least the number of distinct
    prefixes of every level the result is that of scoring every item. A prefix whose items are all denied to a user
    never takes one of that user's beams. A legal item of probability zero (-inf) is still an item: it ranks last.

    Args:
        next_log_probs: the model; see ``NextLogProbs``. Called once per code level.
        trie: the legal IDs; ``trie.restrict(items)`` makes it an allow set.
        num_users: ``U``.
        num_beams: ``M``, the prefixes kept per user and level.
        num_results: items wanted per user; may exceed what the beams hold.
        denied_items: ``(Q,)`` int64 item indices never to return, user after user; repeats are harmless.
        denied_offsets: ``(U + 1,)`` int64; user ``u`` is denied ``denied_items[denied_offsets[u]:denied_offsets[u + 1]]``.
        device: where to search; None (or the same device) is where the trie lives.
        check_nan: read one flag back after the last level and raise on NaN. False synchronises nowhere; then a user
            for whom the model gave NaN gets unspecified items.

    Raises:
        ValueError: if an argument is malformed (indices are checked where ``denied_items`` lies on the CPU), or the
            model returns a wrong shape, dtype, or (``check_nan``) NaN for a legal code.
    """
    _check_arguments(trie, num_users, num_beams, num_results, device)
    denied = _sort_denied(trie, num_users, denied_items, denied_offsets)
    if num_users == 0 or trie.num_nodes(trie.num_levels) == 0:
        return _no_results(num_users, num_results, trie.device)
    nodes = torch.zeros((num_users, 1), dtype=torch.int64, device=trie.device)
    scores = torch.zeros((num_users, 1), dtype=torch.float32, device=trie.device)
    prefixes = torch.zeros((num_users, 1, 0), dtype=torch.int64, device=trie.device)
    parents = torch.zeros((num_users, 1), dtype=torch.int64, device=trie.device)
    nan_found = torch.zeros((), dtype=torch.bool, device=trie.device)
    for level, width in enumerate(trie.widths):
        log_probs = next_log_probs(prefixes, parents)
        _check_log_probs(log_probs, (*nodes.shape, width), level)
        rows = _Candidates.of(trie, level, nodes)
        beams, children, is_alive = rows.locate(torch.arange(rows.width, device=trie.device).expand(num_users, -1).contiguous())
        tokens = trie.child_tokens[level].index_select(0, children.flatten()).view_as(children)
        candidate_scores = scores.gather(1, beams) + log_probs.flatten(1).gather(1, beams * width + tokens)
        nan_found |= (candidate_scores.isnan() & is_alive).any()
        is_alive &= ~_denied_candidates(trie, level, nodes, rows, denied)
        keys = ranking_keys(candidate_scores, is_alive)
        num_kept = min(num_beams, trie.num_nodes(level + 1), rows.width)
        # ascending places are ascending nodes: the invariant that makes ties lexicographic at the next level
        places = torch.topk(keys, num_kept, dim=1, sorted=False).indices.sort(dim=1).values
        is_alive = is_alive.gather(1, places)
        # dead beams go last, so that the row stays ascending with the sentinel n_l for them
        order = torch.sort(~is_alive, dim=1, stable=True).indices
        places, is_alive = places.gather(1, order), is_alive.gather(1, order)
        parents, children, _ = rows.locate(places)
        scores = candidate_scores.gather(1, places).masked_fill(~is_alive, -torch.inf)
        nodes = children.masked_fill(~is_alive, trie.num_nodes(level + 1))
        tokens = trie.child_tokens[level].index_select(0, children.flatten()).view_as(children)
        prolonged = prefixes.gather(1, parents[:, :, None].expand(-1, -1, level))
        prefixes = torch.cat([prolonged, tokens[:, :, None]], dim=2).masked_fill(~is_alive[:, :, None], 0)
    if check_nan and bool(nan_found):
        raise ValueError("next_log_probs must not return NaN for a legal code, got NaN: look for diverged weights or inputs")
    return _rank_items(trie, nodes, scores, denied, num_results)


@dataclass(frozen=True, slots=True)
class _Candidates:
    """The children of a user's beams, end to end: place ``e`` of row ``u`` is child ``e + shift[u, beam of e]``."""

    ends: Tensor
    """``(U, M_l)`` int64: the place after the last child of each beam."""
    shift: Tensor
    """``(U, M_l)`` int64."""
    width: int
    """``E``."""
    num_children: int
    """Nodes of the next level, or items: real children lie below it."""

    @classmethod
    def of(cls, trie: PrefixTrie, level: int, nodes: Tensor) -> "_Candidates":
        """``nodes`` ``(U, M_l)`` ascending; a dead beam is ``n_l``. Level ``C`` has the items of the leaves as children."""
        offsets = trie.leaf_item_offsets if level == trie.num_levels else trie.child_offsets[level]
        first = offsets.index_select(0, nodes.flatten()).view_as(nodes)
        after = offsets.index_select(0, (nodes + 1).clamp(max=trie.num_nodes(level)).flatten()).view_as(nodes)
        ends = (after - first).cumsum(1)
        num_children = len(trie.leaf_items) if level == trie.num_levels else trie.num_nodes(level + 1)
        return cls(ends, after - ends, int(trie.widest_rows[level][nodes.shape[1]]), num_children)

    def locate(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Beam, child and whether there is one, each like ``places`` ``(U, n)``; past the last child: any valid index."""
        beams = torch.searchsorted(self.ends, places, right=True).clamp_(max=self.ends.shape[1] - 1)
        children = (places + self.shift.gather(1, beams)).clamp_(max=self.num_children - 1)
        return beams, children, places < self.ends[:, -1:]


@dataclass(frozen=True, slots=True)
class _Denied:
    """Denied (user, item) pairs in the order of users and, within one, of the trie's leaves: hence of nodes at every level."""

    users: Tensor
    """``(Q,)`` int64; ``U``, which no beam has, for an item that the trie does not hold."""
    path: Tensor
    """``(Q, C + 2)`` int64: nodes from the root to the leaf, then the position in ``leaf_items``."""
    distinct_before: Tensor
    """``(Q + 1,)`` int64: how many distinct pairs come before each."""


def _sort_denied(trie: PrefixTrie, num_users: int, items: Tensor | None, offsets: Tensor | None) -> _Denied | None:
    if items is None and offsets is None:
        return None
    if items is None or offsets is None:
        raise ValueError("denied_items and denied_offsets must be given together, got only one of them")
    if items.dim() != 1 or items.dtype != torch.int64 or offsets.shape != (num_users + 1,) or offsets.dtype != torch.int64:
        raise ValueError(
            f"denied_items must be int64 of shape (Q,) and denied_offsets int64 of shape ({num_users + 1},), got "
            f"{items.dtype} {tuple(items.shape)} and {offsets.dtype} {tuple(offsets.shape)}"
        )
    if items.device.type == "cpu" and len(items) and not 0 <= int(items.min()) <= int(items.max()) < trie.num_items:
        raise ValueError(f"denied_items must lie in [0, {trie.num_items}), got values from {int(items.min())} to {int(items.max())}")
    if offsets.device.type == "cpu" and (offsets[0] != 0 or offsets[-1] != len(items) or bool((offsets.diff() < 0).any())):
        raise ValueError(f"denied_offsets must rise from 0 to {len(items)}, got {offsets.tolist()[:8]}...")
    if len(items) == 0 or len(trie.leaf_items) == 0:
        return None
    items, offsets = items.to(trie.device), offsets.to(trie.device)
    users = torch.searchsorted(offsets[1:].contiguous(), torch.arange(len(items), device=trie.device), right=True)
    ranks = trie.rank_of_item.index_select(0, items)
    users = users.masked_fill(ranks < 0, num_users)
    keys = (users * len(trie.leaf_items) + ranks.clamp(min=0)).sort().values
    users = keys // len(trie.leaf_items)
    ranks = keys - users * len(trie.leaf_items)
    is_new = torch.cat([torch.ones_like(keys[:1], dtype=torch.bool), keys[1:] != keys[:-1]])
    leaves = trie.leaf_of_item.index_select(0, trie.leaf_items.index_select(0, ranks))
    path = torch.cat([trie.path_of_leaves(leaves), ranks[:, None]], dim=1)
    return _Denied(users, path, torch.nn.functional.pad(is_new.cumsum(0), (1, 0)))


def _denied_candidates(trie: PrefixTrie, level: int, nodes: Tensor, rows: _Candidates, denied: _Denied | None) -> Tensor:
    """``(U, E)`` bool: the candidates all of whose items are denied to the user; work grows with ``Q``, not with ``U * N``."""
    num_users, num_beams = nodes.shape
    mask = torch.zeros(num_users * rows.width + 1, dtype=torch.bool, device=nodes.device)
    if denied is not None:
        child = denied.path[:, level + 1].contiguous()
        is_dead = denied.users < num_users
        if level < trie.num_levels:
            keys = denied.users * rows.num_children + child
            same = [denied.distinct_before.index_select(0, torch.searchsorted(keys, keys, right=right)) for right in (False, True)]
            is_dead &= same[1] - same[0] == trie.num_items_below[level + 1].index_select(0, child)
        stride = trie.num_nodes(level) + 1
        owner = torch.arange(num_users, device=nodes.device)[:, None]
        beam_keys = (owner * stride + nodes).flatten()
        wanted = denied.users * stride + denied.path[:, level]
        slots = torch.searchsorted(beam_keys, wanted).clamp_(max=num_users * num_beams - 1)
        is_dead &= beam_keys.index_select(0, slots) == wanted
        places = denied.users * rows.width + child - rows.shift.flatten().index_select(0, slots)
        # one spare element takes the writes of pairs that kill nothing
        mask.scatter_(0, places.masked_fill(~is_dead, num_users * rows.width), True)
    return mask[:-1].view(num_users, rows.width)


def ranking_keys(scores: Tensor, is_alive: Tensor) -> Tensor:
    """Distinct int64 keys ``(U, E)``: a higher score first, then a lower place; the dead below even a score of -inf.

    ``torch.topk`` promises nothing about ties; with distinct keys there are none, at less cost than a stable sort.
    """
    # exponent and mantissa of a negative number are flipped to order as integers; -0.0 never comes: sums began at 0.0
    bits = scores.view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    low = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
    return ((bits.to(torch.int64) << 32) | low).masked_fill_(~is_alive, torch.iinfo(torch.int64).min)


def _rank_items(trie: PrefixTrie, nodes: Tensor, scores: Tensor, denied: _Denied | None, num_results: int) -> BeamResult:
    num_users = len(nodes)
    rows = _Candidates.of(trie, trie.num_levels, nodes)
    beams, ranks, is_alive = rows.locate(torch.arange(rows.width, device=nodes.device).expand(num_users, -1).contiguous())
    item_scores = scores.gather(1, beams)
    is_alive &= ~_denied_candidates(trie, trie.num_levels, nodes, rows, denied)
    places = torch.topk(ranking_keys(item_scores, is_alive), min(num_results, rows.width), dim=1).indices
    is_alive = is_alive.gather(1, places)
    items = trie.leaf_items.index_select(0, ranks.gather(1, places).flatten()).view_as(places)
    result = _no_results(num_users, num_results, nodes.device)
    result.items[:, : places.shape[1]] = items.masked_fill(~is_alive, -1)
    result.scores[:, : places.shape[1]] = item_scores.gather(1, places).masked_fill(~is_alive, -torch.inf)
    return result


def _no_results(num_users: int, num_results: int, device: torch.device) -> BeamResult:
    shape = (num_users, num_results)
    items = torch.full(shape, -1, dtype=torch.int64, device=device)
    return BeamResult(items, torch.full(shape, -torch.inf, dtype=torch.float32, device=device))


def _check_arguments(trie: PrefixTrie, num_users: int, num_beams: int, num_results: int, device: torch.device | str | None) -> None:
    for name, value, least in (("num_users", num_users, 0), ("num_beams", num_beams, 1), ("num_results", num_results, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if device is not None and torch.empty(0, device=device).device != trie.device:
        raise ValueError(f"device must be that of the trie ({trie.device}), got {device}; move the trie with trie.to(device)")


def _check_log_probs(log_probs: Tensor, shape: tuple[int, ...], level: int) -> None:
    if log_probs.shape != shape or log_probs.dtype != torch.float32:
        raise ValueError(
            f"next_log_probs must return float32 of shape {shape} at level {level}, got {log_probs.dtype} of shape {tuple(log_probs.shape)}"
        )
