"""The whole method in plain float64 numpy, for the tests to compare with.

Written from the paper's equations, one loop for each sum, without a look at the library's own code:
slow, short and meant to be checked by eye. Nothing here is differentiable; gradients are compared with
central differences of these functions.

Axes: `B` batch, `K` neighbours, `N` rows of a base (pairs or prototypes), `d` width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
Base = tuple[Array, Array]  # audio rows and text rows, each (N, d)


def unit_length(rows: Array) -> Array:
    """Each row divided by its length; rows of zeros stay."""
    lengths = np.array([np.sqrt(sum(x * x for x in row)) for row in rows])
    return np.array([row / length if length > 0 else row for row, length in zip(rows, lengths, strict=True)])


def top_k(
    queries: Array,
    base: Array,
    k: int,
    query_ids: Array | None = None,
    base_ids: Array | None = None,
    distinct: bool = False,
) -> Array:
    """`(B, K)` rows of highest inner product, equal scores by row.

    Rows with the query's id are dropped, and, if `distinct`, those with the id of a row that came before.
    """
    found = []
    for i, query in enumerate(queries):
        candidates = [
            (-float(query @ row), j)
            for j, row in enumerate(base)
            if query_ids is None or base_ids[j] != query_ids[i]
        ]
        chosen, seen = [], set()
        for _, j in sorted(candidates):
            if len(chosen) < k and not (distinct and base_ids[j] in seen):
                chosen.append(j)
                seen.add(base_ids[j] if distinct else j)
        found.append(chosen)
    return np.array(found)


def smallest_margin(queries: Array, base: Array, k: int) -> float:
    """Least gap between the last score that is retrieved and the first that is not."""
    gaps = [np.inf]
    for query in queries:
        scores = sorted((float(query @ row) for row in base), reverse=True)
        if k < len(scores):
            gaps.append(scores[k - 1] - scores[k])
    return min(gaps)


def inject_knowledge(embeddings: Array, neighbors: Array, ratio: float, renormalize: bool = False) -> Array:
    """Eq. 9: `(1 - ρ) u + ρ mean_k U[R_a]_k`."""
    mixed = np.array(
        [
            (1 - ratio) * u + ratio * sum(rows) / len(rows)
            for u, rows in zip(embeddings, neighbors, strict=True)
        ]
    )
    return unit_length(mixed) if renormalize else mixed


def softmax(scores: Array) -> Array:
    """Of a vector."""
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def reliability_potential(embeddings: Array, crossed: Array, own: Array) -> Array:
    """Eq. 11–13: `(B,)`, Ψ_i = Σ_j w_j exp(u · X_j), w = softmax of each X_j's mean similarity to `own`."""
    potentials = []
    for u, found_by_other, found_by_itself in zip(embeddings, crossed, own, strict=True):
        mean_similarity = np.array([np.mean([x @ y for y in found_by_itself]) for x in found_by_other])
        weights = softmax(mean_similarity)
        potentials.append(sum(w * np.exp(u @ x) for w, x in zip(weights, found_by_other, strict=True)))
    return np.array(potentials)


def log_sum_exp(scores: Array, axis: int) -> Array:
    """Of a matrix, along an axis, which is kept."""
    largest = scores.max(axis=axis, keepdims=True)
    return largest + np.log(np.exp(scores - largest).sum(axis=axis, keepdims=True))


def sinkhorn_plan(similarity: Array, epsilon: float, iterations: int | None = None) -> Array:
    """Eq. 15: the plan of uniform marginals 1/B and 1/C that maximises ⟨Q, S⟩ + ε H(Q).

    Alternately brings the rows, then the columns, of `exp(S/ε)` to their sums, on logarithms. Without a
    number of iterations it goes on until the rows hold to within 1e-13 after a column update.
    """
    num_rows, num_columns = similarity.shape
    log_plan = similarity / epsilon
    for _ in range(iterations if iterations is not None else 100_000):
        log_plan = log_plan - log_sum_exp(log_plan, axis=1) - np.log(num_rows)
        log_plan = log_plan - log_sum_exp(log_plan, axis=0) - np.log(num_columns)
        if iterations is None and np.abs(np.exp(log_plan).sum(axis=1) * num_rows - 1).max() < 1e-13:
            break
    else:
        assert iterations is not None, "Sinkhorn did not converge"
    return np.exp(log_plan)


def realign_similarity(similarity: Array, plan: Array, ot_factor: float, plan_scaling: str) -> Array:
    """Eq. 15: `((1 - β) I + β Q̂) S` with Q̂ = Q* or, with "row", Q̂ = B Q*."""
    batch = len(similarity)
    scaled = {"marginal": plan, "row": batch * plan}[plan_scaling]
    return ((1 - ot_factor) * np.eye(batch) + ot_factor * scaled) @ similarity


def cross_entropy(logits: Array, ids: Array | None = None) -> Array:
    """`(B,)`, -log of the diagonal's share in each row; other entries of the same id are left out."""
    values = []
    for i, row in enumerate(logits):
        kept = [x for j, x in enumerate(row) if j == i or ids is None or ids[j] != ids[i]]
        values.append(max(kept) + np.log(sum(np.exp(np.array(kept) - max(kept)))) - row[i])
    return np.array(values)


@dataclass
class Terms:
    """What one evaluation of the loss computed; dictionaries are keyed by granularity."""

    loss: float = 0.0
    rows: dict[str, tuple[Array, Array]] = field(default_factory=dict)  # found by audio, found by text
    plans: dict[str, Array] = field(default_factory=dict)
    potentials: dict[str, tuple[Array, Array]] = field(default_factory=dict)  # text-to-audio, audio-to-text
    factors: tuple[Array, Array] | None = None  # text-to-audio, audio-to-text; not of a term
    contrastive: tuple[Array, Array] | None = None  # (B,) each, summed over granularities


def ask_loss(
    audio: Array,
    text: Array,
    bases: Mapping[str, Base],
    *,
    ids: Array | None = None,
    base_ids: Array | None = None,
    num_neighbors: int = 10,
    injection_ratio: float = 0.2,
    ot_factor: float = 0.2,
    lambda_fine: float = 0.2,
    lambda_coarse: float = 0.3,
    temperature: float = 0.07,
    sinkhorn_epsilon: float = 0.1,
    sinkhorn_iterations: int = 50,
    renormalize_injected: bool = False,
    plan_scaling: str = "marginal",
    a2t_realignment: str = "transposed_plan",
    transport: Callable[[Array], Array] | None = None,
    num_coarse_neighbors: int | None = None,
    exclude_self: bool = False,
    distinct_clips: bool = False,
    positives: str = "diagonal",
    modulation: str = "batch",
    reliability_form: str = "disagreement_factor",
    held: Terms | None = None,
    hold: tuple[str, ...] = (),
) -> Terms:
    """One training step, Eq. 9–19, with the granularities that `bases` has.

    `transport` makes the plan of a similarity; default: Sinkhorn's iteration.

    `hold` names the terms ("rows", "plans", "factors") that are taken from `held` instead of computed:
    what is constant in the backward pass has to be constant in a difference quotient.
    """
    u, v = unit_length(audio), unit_length(text)
    strength = {"fine": lambda_fine, "coarse": lambda_coarse}
    terms = Terms()
    sign = 1 if reliability_form.startswith("agreement") else -1
    unreliable_ta, unreliable_at = np.zeros(len(u)), np.zeros(len(u))  # Σ_g λ_g F_{i,g}
    contrastive_ta, contrastive_at = np.zeros(len(u)), np.zeros(len(u))

    for name, (base_audio, base_text) in bases.items():
        own_k = num_coarse_neighbors if name == "coarse" and num_coarse_neighbors else num_neighbors
        k = min(own_k, len(base_audio))
        is_fine = name == "fine"
        by_id = (ids if exclude_self and is_fine else None, base_ids, distinct_clips and is_fine)
        by_audio, by_text = top_k(u, base_audio, k, *by_id), top_k(v, base_text, k, *by_id)
        if "rows" in hold:
            by_audio, by_text = held.rows[name]
        terms.rows[name] = by_audio, by_text

        u_injected = inject_knowledge(u, base_audio[by_audio], injection_ratio, renormalize_injected)
        v_injected = inject_knowledge(v, base_text[by_text], injection_ratio, renormalize_injected)

        psi_ta = reliability_potential(u, crossed=base_audio[by_text], own=base_audio[by_audio])
        psi_at = reliability_potential(v, crossed=base_text[by_audio], own=base_text[by_text])
        terms.potentials[name] = psi_ta, psi_at
        unreliable_ta += strength[name] * sign * np.log(psi_ta)
        unreliable_at += strength[name] * sign * np.log(psi_at)

        similarity = v_injected @ u_injected.T  # rows text, columns audio
        plan = (
            transport(similarity)
            if transport is not None
            else sinkhorn_plan(similarity, sinkhorn_epsilon, sinkhorn_iterations)
        )
        if "plans" in hold:
            plan = held.plans[name]
        terms.plans[name] = plan
        realigned_ta = realign_similarity(similarity, plan, ot_factor, plan_scaling)
        realigned_at = {
            "transposed_plan": realign_similarity(similarity.T, plan.T, ot_factor, plan_scaling),
            "transposed_result": realigned_ta.T,
            "same_plan": realign_similarity(similarity.T, plan, ot_factor, plan_scaling),
        }[a2t_realignment]

        same_clip = ids if positives == "ids" else None
        contrastive_ta += cross_entropy(realigned_ta / temperature, same_clip)
        contrastive_at += cross_entropy(realigned_at / temperature, same_clip)

    terms.contrastive = contrastive_ta, contrastive_at
    if reliability_form.endswith("term"):
        sums = (contrastive_ta + unreliable_ta, contrastive_at + unreliable_at)
        terms.loss = float(sums[0].mean() + sums[1].mean()) / 2
        return terms
    if modulation == "batch":
        unreliable_ta, unreliable_at = unreliable_ta.mean(), unreliable_at.mean()
    factor_ta, factor_at = 1 + unreliable_ta, 1 + unreliable_at
    if "factors" in hold:
        factor_ta, factor_at = held.factors
    terms.factors = factor_ta, factor_at
    terms.loss = float(np.mean(factor_ta * contrastive_ta) + np.mean(factor_at * contrastive_at)) / 2
    return terms


def gradient(function: Callable[[Array], float], point: Array, step: float = 1e-5) -> Array:
    """Central differences, one entry at a time."""
    slopes = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        above, below = point.copy(), point.copy()
        above[index] += step
        below[index] -= step
        slopes[index] = (function(above) - function(below)) / (2 * step)
    return slopes


def out_of_batch_influence(loss: Callable[[Array, Array], float], base: Base) -> float:
    """Eq. 2 by brute force: every entry of every row of both bases is moved."""
    by_audio = gradient(lambda rows: loss(rows, base[1]), base[0])
    by_text = gradient(lambda rows: loss(base[0], rows), base[1])
    per_row = [np.linalg.norm(a) + np.linalg.norm(t) for a, t in zip(by_audio, by_text, strict=True)]
    return float(np.mean(per_row))


def divergence(p: Array, q: Array) -> float:
    """KL(p ‖ q)."""
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def representation_drift(queries: Array, current: Array, stored: Array) -> float:
    """Eq. 4: mean over queries of KL(softmax over current rows ‖ softmax over stored rows)."""
    return float(np.mean([divergence(softmax(current @ u), softmax(stored @ u)) for u in queries]))
