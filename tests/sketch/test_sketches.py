"""Sketches as estimators of inner products: what is exact, what is unbiased, with which variance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_pathkernel.capture.gradients import DenseGradient, FactoredGradient, OuterGradient, VectorGradient
from lightning_pathkernel.sketch import (
    SKETCHES,
    KroneckerSketch,
    SideMoments,
    SketchSettings,
    fit_second_stage,
    fit_sketch,
    rank_one_log,
    register_sketch,
)
from lightning_pathkernel.sketch.balance import balanced_factors
from lightning_pathkernel.sketch.deflation import deflated_factor

KINDS = ["identity", "random", "deflated", "balanced"]


def private(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=private(seed), dtype=torch.float64).to(dtype)


def orthonormal(seed: int, d: int, rank: int) -> Tensor:
    return torch.linalg.qr(normal(seed, d, rank))[0]


def power_law(seed: int, n: int, d: int, exponent: float = 1.0) -> Tensor:
    """Samples ``[n, d]`` whose second moment has eigenvalues ``j ** (-2 exponent)`` in a random basis."""
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** -exponent
    return (normal(seed, n, d) * scale) @ orthonormal(seed + 1, d, d).T


def sides(train: Tensor, query: Tensor | None) -> tuple[SideMoments, SideMoments]:
    """Moments of gradients ``[n, r, c]``, as the recorder takes them."""
    rows, columns = DenseGradient(train).moments()
    if query is None:
        return SideMoments(rows), SideMoments(columns)
    query_rows, query_columns = DenseGradient(query).moments()
    return SideMoments(rows, query_rows), SideMoments(columns, query_columns)


def fitted(
    kind: str, seed: int = 0, r: int = 20, c: int = 30, width: int = 8, dtype: torch.dtype = torch.float64
) -> KroneckerSketch:
    train, query = normal(1, 40, r, c, dtype=dtype), normal(2, 40, r, c, dtype=dtype)
    return fit_sketch(*sides(train, query), SketchSettings(kind, width=width), private(seed))


def products(sketch: KroneckerSketch, query: Tensor, train: Tensor) -> Tensor:
    """``<S_query(J_m), S_train(G_n)>``, ``[m, n]``."""
    return sketch.query(DenseGradient(query)) @ sketch.train(DenseGradient(train)).T


def inner(query: Tensor, train: Tensor) -> Tensor:
    return query.flatten(1) @ train.flatten(1).T


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def estimates(kind: str, seeds: range, k: int, G: Tensor, J: Tensor) -> Tensor:
    """One estimate of ``<J, G>`` from each seed."""
    left, right = sides(torch.stack([G, J]), None)
    settings = SketchSettings(kind, width=k)
    return torch.stack([products(fit_sketch(left, right, settings, private(s)), J[None], G[None])[0, 0] for s in seeds])


# random rows


@pytest.mark.parametrize("kind", ["random", "deflated"])
def test_the_random_part_is_unbiased(kind: str) -> None:
    """Moments of rank 12 and 6 kept rows: a good part of <J, G> goes through the random rows."""
    G, J = (0.3 * normal(3, 2, 12, 14) + normal(4, 12, 14)).unbind()
    seeds, k = range(1000), 8
    found = estimates(kind, seeds, k, G, J)
    assert found.std() > 0.02 * float((J * G).sum())
    error = float(found.std()) / len(seeds) ** 0.5
    assert abs(float(found.mean() - (J * G).sum())) < 4 * error


def exact_variance(J: Tensor, G: Tensor, k: int) -> float:
    """Variance of ``X = <L J R^T, L G R^T>`` for normal L and R of k rows with entries of variance 1 / k.

    With ``A = L^T L`` and ``B = R^T R``, ``X = sum A_ab B_cd J_ac G_bd``. By Isserlis' theorem

        E[A_ab A_ef] = 1(a=b) 1(e=f) + (1(a=e) 1(b=f) + 1(a=f) 1(b=e)) / k

    and the same for B, so ``E[X^2]`` is a sum of nine terms. That of both first pairings is ``<J, G>^2 = E[X]^2``; the
    others are, with M = J^T G and N = J G^T,

        first of A with the two of B:   (|M|^2 + tr M^2) / k
        the two of A with first of B:   (|N|^2 + tr N^2) / k
        the two of A with those of B:   (|J|^2 |G|^2 + |N|^2 + |M|^2 + <J, G>^2) / k^2

    Every term is at most ``|J|^2 |G|^2`` (Cauchy and Schwarz), hence the bound of `variance_bound`.
    """
    M, N = J.T @ G, J @ G.T
    m, n = (M**2).sum(), (N**2).sum()
    once = m + torch.trace(M @ M) + n + torch.trace(N @ N)
    twice = (J**2).sum() * (G**2).sum() + m + n + (J * G).sum() ** 2
    return float(once / k + twice / k**2)


def variance_bound(J: Tensor, G: Tensor, k: int) -> float:
    return float((J**2).sum() * (G**2).sum()) * ((1 + 2 / k) ** 2 - 1)


def empirical_variance(J: Tensor, G: Tensor, k: int, n: int = 3000) -> tuple[float, float]:
    """The variance over seeds, and its standard error."""
    squares = (estimates("random", range(n), k, G, J) - (J * G).sum()) ** 2
    return float(squares.mean()), float(squares.std()) / n**0.5


@pytest.mark.parametrize("k", [2, 8])
@pytest.mark.parametrize("alike", [False, True])
def test_the_variance_is_the_analytic_one_and_below_the_bound(k: int, alike: bool) -> None:
    G = normal(5, 9, 11)
    J = G if alike else normal(6, 9, 11)
    found, error = empirical_variance(J, G, k)
    assert abs(found - exact_variance(J, G, k)) < 4 * error
    assert exact_variance(J, G, k) < variance_bound(J, G, k)
    assert found < variance_bound(J, G, k)


def test_the_bound_is_met_by_aligned_rank_one_gradients() -> None:
    G = torch.outer(normal(7, 9), normal(8, 11))
    assert exact_variance(G, G, 4) == pytest.approx(variance_bound(G, G, 4))
    found, error = empirical_variance(G, G, 4)
    assert abs(found - variance_bound(G, G, 4)) < 4 * error


def test_the_variance_falls_like_one_over_k() -> None:
    """Two octaves of k on gradients close to rank one, where the terms in 1 / k^2 weigh little."""
    G = torch.outer(normal(5, 40), normal(6, 40)) + 0.05 * normal(7, 40, 40)
    falls = empirical_variance(G, G, 8)[0] / empirical_variance(G, G, 32)[0]
    assert 4 < exact_variance(G, G, 8) / exact_variance(G, G, 32) < 4.5
    assert 3.5 < falls < 5


# deflated


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("other", ["train", "query"])
def test_deflated_is_exact_where_either_gradient_lies_in_the_kept_subspace(
    dtype: torch.dtype, tolerance: float, other: str
) -> None:
    """Six of eight rows are eigenvectors, so moments of rank six are kept whole."""
    r, c, rank = 40, 150, 6
    inside = (orthonormal(0, r, rank) @ normal(1, 50, rank, rank) @ orthonormal(2, c, rank).T).to(dtype)
    anything = normal(3, 50, r, c, dtype=dtype)
    sketch = fit_sketch(*sides(inside, None), SketchSettings("deflated", width=8), private(4))
    query, train = (inside, anything) if other == "train" else (anything, inside)
    assert gap(products(sketch, query, train), inner(query, train)) < tolerance


def test_the_random_rows_of_a_deflated_factor_are_orthogonal_to_the_kept_ones() -> None:
    samples = power_law(0, 80, 50)
    factor = deflated_factor(samples, 8, private(1))
    kept, random = factor[:6], factor[6:]
    torch.testing.assert_close(kept @ kept.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float((random @ kept.T).abs().max()) < 1e-12
    assert random.norm() > 1


def test_the_kept_rows_are_the_leading_eigenvectors() -> None:
    samples = power_law(0, 400, 50, exponent=2.0)
    kept = deflated_factor(samples, 8, private(1))[:6]
    energy, best = (samples @ kept.T).norm() ** 2, torch.linalg.svdvals(samples)[:6].norm() ** 2
    assert energy > (1 - 1e-4) * best


# balanced

SMALL, LARGE = 60, 150
"""Below and above the dimension (96) from which the range finder is used."""


@pytest.mark.parametrize("d", [SMALL, LARGE])
@pytest.mark.parametrize("ridge", [0.03, 1e-8])
def test_balanced_factors_are_biorthogonal(d: int, ridge: float) -> None:
    P, Q = balanced_factors(power_law(0, 200, d), power_law(5, 200, d), 16, ridge, private(1))
    assert P.shape == Q.shape == (16, d)
    torch.testing.assert_close(P @ Q.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-8)
    assert gap(P, Q) > 0.1, "the two sides have different moments: the projection is oblique"


@pytest.mark.parametrize("d", [SMALL, LARGE])
def test_balanced_is_exact_in_a_common_subspace(d: int) -> None:
    U = orthonormal(0, d, 8)
    train, query = power_law(1, 60, 8) @ U.T, power_law(3, 60, 8, exponent=-2.0) @ U.T
    P, Q = balanced_factors(train, query, 8, 1e-10, private(2))
    assert gap(query @ Q.T @ P @ train.T, query @ train.T) < 1e-8


@pytest.mark.parametrize("c", [SMALL, LARGE])
@pytest.mark.parametrize("seed", range(3))
def test_balanced_is_better_where_the_query_side_is_badly_scaled(c: int, seed: int) -> None:
    """Adam: a preconditioner over orders of magnitude on the query side, and other leading directions there.

    Judged by fresh samples, not by those that were fitted.
    """
    r, n, width = 40, 128, 16
    spectrum = torch.arange(1, r + 1, dtype=torch.float64)[:, None] * torch.arange(1, c + 1, dtype=torch.float64)
    U, V = orthonormal(seed, r, r), orthonormal(seed + 10, c, c)
    D = (1.5 * (normal(seed + 20, r, 1) + normal(seed + 30, c))).exp()
    train = U @ (normal(seed + 40, 2 * n, r, c) / spectrum) @ V.T
    other = orthonormal(seed + 50, r, r) @ (normal(seed + 60, 2 * n, r, c) / spectrum) @ orthonormal(seed + 70, c, c).T
    query = D * (other + train.flip(0))
    wanted = inner(query[n:], train[n:])
    errors = {}
    for kind in ("random", "deflated", "balanced"):
        sketch = fit_sketch(*sides(train[:n], query[:n]), SketchSettings(kind, width=width), private(seed + 80))
        errors[kind] = gap(products(sketch, query[n:], train[n:]), wanted)
    assert errors["balanced"] < 0.05, errors
    assert errors["balanced"] < 0.2 * errors["deflated"], errors
    assert errors["balanced"] < 0.2 * errors["random"], errors


def test_balanced_without_queries_is_deflated() -> None:
    left, right = sides(normal(0, 40, 20, 30), None)
    a, b = (fit_sketch(left, right, SketchSettings(kind, width=8), private(1)) for kind in ("balanced", "deflated"))
    assert all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))


# every kind


def test_identity_is_exact() -> None:
    G, J = normal(0, 5, 20, 30), normal(1, 5, 20, 30)
    sketch = fitted("identity")
    assert sketch.shape == (20, 30)
    assert not sketch.tensors()
    torch.testing.assert_close(products(sketch, J, G), inner(J, G), rtol=1e-13, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_side_of_at_most_the_width_is_kept_exactly(kind: str) -> None:
    whole = fitted(kind, r=8, c=7, width=8)
    assert (whole.shape, whole.tensors()) == ((8, 7), {})
    half = fitted(kind, r=8, c=9, width=8)
    assert (half.train_left, half.query_left) == (None, None)
    assert (half.train_right is None) == (kind == "identity")


@pytest.mark.parametrize("kind", KINDS)
def test_the_adjoint_of_query(kind: str) -> None:
    sketch = fitted(kind)
    J, z = normal(0, 5, 20, 30), normal(1, 4, sketch.features)
    left = sketch.query(DenseGradient(J)) @ z.T
    torch.testing.assert_close(left, inner(J, sketch.synthesise(z)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_preconditioner_multiplies_the_query(kind: str) -> None:
    sketch = fitted(kind)
    J, G, D = normal(0, 5, 20, 30), normal(1, 4, 20, 30), normal(2, 20, 30).exp()
    found = sketch.query(DenseGradient(J), D)
    torch.testing.assert_close(found, sketch.query(DenseGradient(D * J)))
    if kind == "identity":
        torch.testing.assert_close(found @ sketch.train(DenseGradient(G)).T, inner(J, D * G))


@pytest.mark.parametrize("kind", KINDS)
def test_train_does_not_depend_on_the_gradients_form(kind: str) -> None:
    sketch = fitted(kind)
    left, right = normal(0, 5, 20), normal(1, 5, 30)
    expected = sketch.train(DenseGradient(left[:, :, None] * right[:, None]))
    torch.testing.assert_close(sketch.train(OuterGradient(left, right)), expected)
    torch.testing.assert_close(sketch.train(FactoredGradient(left[:, None], right[:, None])), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_train_matrix_is_train_of_one_gradient(kind: str) -> None:
    sketch = fitted(kind)
    G = normal(0, 1, 20, 30)
    torch.testing.assert_close(sketch.train_matrix(G[0]), sketch.train(DenseGradient(G))[0])


# scales


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [True, False])
def test_a_scale_moves_from_the_query_to_the_training_side(kind: str, columns: bool) -> None:
    sketch = fitted(kind)
    left, right = normal(0, 20).exp(), normal(1, 30).exp() if columns else None
    scale = left[:, None] * (1 if right is None else right)
    scaled = sketch.scaled(left, right)
    J, G = normal(2, 5, 20, 30), normal(3, 4, 20, 30)
    torch.testing.assert_close(products(scaled, J, G), products(sketch, J / scale, G * scale))
    assert scaled.shape == sketch.shape
    if kind == "identity":
        torch.testing.assert_close(products(scaled, J, G), inner(J, G))
    if kind == "balanced":
        assert scaled.train_left is not None
        assert scaled.query_left is not None
        torch.testing.assert_close(
            scaled.train_left @ scaled.query_left.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-8
        )


def test_a_scaled_vector_keeps_one_column() -> None:
    """A vector's gradient has no right factor to scale: all of the scale goes to the left."""
    sketch = fitted("random", r=20, c=1).scaled(normal(0, 20).exp(), normal(1, 1).exp())
    assert sketch.train_right is None
    left, right = normal(0, 20).exp(), normal(1, 1).exp()
    values, J = normal(2, 4, 20), normal(3, 5, 20)
    plain, scale = fitted("random", r=20, c=1), left * right
    expected = plain.query(VectorGradient(J / scale)) @ plain.train(VectorGradient(values * scale)).T
    torch.testing.assert_close(sketch.query(VectorGradient(J)) @ sketch.train(VectorGradient(values)).T, expected)
    torch.testing.assert_close(sketch.train(VectorGradient(values)), plain.train(VectorGradient(values * scale)))


# another basis


def biorthogonal(seed: int, d: int, queries: Tensor) -> tuple[Tensor, Tensor]:
    """A training factor for the given query factor ``[k, d]``, ``P Q^T = 1``, not its pseudo-inverse."""
    metric = normal(seed, d, d)
    metric = metric @ metric.T / d + torch.eye(d, dtype=torch.float64)
    P = torch.linalg.solve(queries @ metric @ queries.T, queries @ metric)
    return P, queries


def pair(seed: int, k: int, containing: KroneckerSketch | None = None) -> KroneckerSketch:
    factors = []
    for side, d in ((0, 20), (1, 30)):
        old = None if containing is None else (containing.query_left, containing.query_right)[side]
        extra = normal(seed + side, k - (0 if old is None else len(old)), d)
        factors.append(biorthogonal(seed + 2 + side, d, extra if old is None else torch.cat([old, extra])))
    (left, query_left), (right, query_right) = factors
    return KroneckerSketch(20, 30, left, right, query_left, query_right)


def test_reexpressing_loses_nothing_where_the_new_basis_contains_the_old_one() -> None:
    old = pair(0, 5)
    new = pair(10, 9, containing=old)
    G, J = normal(20, 4, 20, 30), normal(21, 6, 20, 30)
    rows = old.train(DenseGradient(G))
    found = new.query(DenseGradient(J)) @ old.reexpress(rows, new).T
    assert gap(found, products(old, J, G)) < 1e-10
    assert gap(found, products(new, J, G)) > 0.01, "what the old basis had lost stays lost"


@pytest.mark.parametrize("identity", ["", "left", "right"])
def test_reexpressing_is_exact_for_gradients_in_the_old_kept_subspace(identity: str) -> None:
    old, new = pair(0, 5), pair(10, 6)
    if identity:
        old, new = (
            KroneckerSketch(20, 30, **{n: t for n, t in s.tensors().items() if identity not in n}) for s in (old, new)
        )
    G = old.synthesise(normal(20, 4, old.features))
    found = old.reexpress(old.train(DenseGradient(G)), new)
    assert gap(found, new.train(DenseGradient(G))) < 1e-10


def test_reexpressing_to_and_from_the_identity() -> None:
    sketch, whole = pair(0, 5), KroneckerSketch(20, 30)
    G = normal(20, 4, 20, 30)
    assert gap(whole.reexpress(whole.train(DenseGradient(G)), sketch), sketch.train(DenseGradient(G))) < 1e-12
    rows = sketch.train(DenseGradient(G))
    assert gap(sketch.reexpress(rows, whole), sketch.synthesise(rows).flatten(1)) < 1e-12


@pytest.mark.parametrize("kind", ["random", "deflated"])
def test_reexpressing_again_and_again_does_not_make_rows_longer(kind: str) -> None:
    """Momentum carries a row through many chords while these are short, each with a random basis of its own."""
    generator = torch.Generator().manual_seed(0)
    sides = SideMoments(normal(1, 50, 20)), SideMoments(normal(2, 50, 30))
    old, *others = (fit_sketch(*sides, SketchSettings(kind, width=6), generator) for _ in range(8))
    rows = first = old.train(DenseGradient(normal(3, 4, 20, 30)))
    for new in others:
        rows, old = old.reexpress(rows, new), new
    assert float(rows.norm()) < 2 * float(first.norm())


# randomness


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [30, LARGE])
def test_a_seed_decides_everything_and_the_global_state_nothing(kind: str, c: int) -> None:
    state = torch.get_rng_state()
    first, second, third = (fitted(kind, seed, c=c).tensors() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    if kind in ("random", "deflated"):
        assert all(gap(first[name], third[name]) > 1e-3 for name in first)


def test_the_second_stage_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    train, query = power_law(0, 50, 130), power_law(2, 50, 130)
    first, second = (fit_second_stage(train, query, train.sum(0), 16, SketchSettings(), private(3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first is not None
    assert second is not None
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


# rank one


def test_rank_one_log_recovers_a_rank_one_matrix() -> None:
    left, right = (4 * normal(0, 7)).exp(), (4 * normal(1, 9)).exp()
    for weights in (torch.ones(7, 9, dtype=torch.float64), torch.outer(normal(2, 7).exp(), normal(3, 9).exp())):
        found_left, found_right = rank_one_log(torch.outer(left, right), weights)
        torch.testing.assert_close(torch.outer(found_left, found_right), torch.outer(left, right))
        ratio = found_left / left
        torch.testing.assert_close(ratio, ratio[:1].expand(7))


@pytest.mark.parametrize("poison", [0.0, -1.0, float("nan"), float("inf")])
def test_rank_one_log_does_not_read_entries_of_weight_zero(poison: float) -> None:
    matrix = torch.outer(normal(0, 7).exp(), normal(1, 9).exp())
    ignored = torch.zeros(7, 9, dtype=torch.bool)
    ignored[2], ignored[:, 5], ignored[0, 1], ignored[6, 8] = True, True, True, True
    left, right = rank_one_log(matrix.masked_fill(ignored, poison), (~ignored).double(), sweeps=100)
    assert bool(torch.cat([left, right]).isfinite().all())
    assert bool((torch.cat([left, right]) > 0).all())
    torch.testing.assert_close(torch.outer(left, right)[~ignored], matrix[~ignored])


def test_rank_one_log_is_the_weighted_least_squares_fit() -> None:
    matrix, weights = normal(0, 7, 9).exp(), normal(1, 7, 9).exp()
    rows, columns = torch.meshgrid(torch.arange(7), torch.arange(9), indexing="ij")
    design = torch.cat([torch.eye(7)[rows.flatten()], torch.eye(9)[columns.flatten()]], dim=1).double()
    root = weights.flatten().sqrt()
    solution = torch.linalg.lstsq(design * root[:, None], matrix.log().flatten() * root, driver="gelsd").solution
    left, right = rank_one_log(matrix, weights, sweeps=100)
    torch.testing.assert_close(torch.outer(left, right).log().flatten(), design @ solution)
    near = torch.outer(*rank_one_log(matrix, weights)).log().flatten()
    assert gap(near, design @ solution) < 0.02, "three sweeps are enough in practice"


def test_rank_one_log_of_nothing_is_one() -> None:
    left, right = rank_one_log(torch.zeros(3, 4), torch.zeros(3, 4))
    assert torch.equal(torch.outer(left, right), torch.ones(3, 4))


# second stage


def test_the_second_stage_is_for_more_features_than_are_kept() -> None:
    train = normal(0, 30, 16)
    assert fit_second_stage(train, train, train.sum(0), 16, SketchSettings(), private(0)) is None
    assert fit_second_stage(train, train, train.sum(0), 15, SketchSettings(), private(0)) is not None


@pytest.mark.parametrize("F", [SMALL, LARGE])
@pytest.mark.parametrize("probes", [True, False])
def test_the_second_stage_keeps_the_rows_sum(F: int, probes: bool) -> None:
    """The sum is small in every row: only because its direction is weighted does it survive."""
    k = 16
    train = power_law(0, 300, F)
    train = train - train.mean(0) + 1e-3 * normal(2, F)
    total = train.sum(0)
    query = power_law(3, 200, F)
    maps = fit_second_stage(train, query if probes else None, total, k, SketchSettings(), private(5))
    assert maps is not None
    P, Q = maps
    torch.testing.assert_close(P @ Q.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-8)
    assert gap((train @ P.T).sum(0) @ Q @ query.T, query @ total) < 0.05
    without = balanced_factors(train, query if probes else train, k, SketchSettings().second_ridge, private(5))
    assert gap(total @ without[0].T @ without[1] @ query.T, query @ total) > 0.3


# registry


def test_a_taken_name_is_refused() -> None:
    before = dict(SKETCHES)
    with pytest.raises(ValueError, match="sketch 'random' is registered already"):
        register_sketch("random")(SKETCHES["identity"])
    assert before == SKETCHES


def test_an_own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SKETCHES, "first rows", lambda moments, k, *_: (torch.eye(k, moments.train.shape[1]),) * 2)
    sketch = fitted("first rows", dtype=torch.float32)
    G = normal(0, 3, 20, 30, dtype=torch.float32)
    assert torch.equal(sketch.train(DenseGradient(G)), G[:, :8, :8].flatten(1))


@pytest.mark.parametrize("c", [30, 8])
def test_an_unknown_kind(c: int) -> None:
    """Also where both sides are small enough to be kept exactly: a misspelt name must not pass unnoticed."""
    with pytest.raises(KeyError, match="balancd"):
        fitted("balancd", r=8, c=c)


@pytest.mark.parametrize("whole", ["left", "right", "none"])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_energy_form_is_that_of_the_gradient_that_features_stand_for(whole: str, preconditioned: bool) -> None:
    left = None if whole == "left" else normal(40, 4, 6)
    right = None if whole == "right" else normal(41, 5, 9)
    sketch = KroneckerSketch(6, 9, left, right, left, right)
    z, D = normal(42, sketch.features), normal(43, 6, 9).exp() if preconditioned else torch.ones(6, 9).double()
    G = sketch.synthesise(z)
    expected = float((G * D * G).sum())
    assert float(z @ sketch.energy_form(D if preconditioned else None) @ z) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kept", ["both", "left", "right", "neither"])
def test_a_preconditioner_folded_into_a_factor_gives_the_features_of_the_whole_gradient(kept: str) -> None:
    left = normal(44, 4, 6) if kept in ("both", "left") else None
    right = normal(45, 5, 9) if kept in ("both", "right") else None
    sketch, D = KroneckerSketch(6, 9, left, right, left, right), normal(46, 6, 9).exp()
    outer = OuterGradient(normal(47, 7, 6), normal(48, 7, 9))
    assert gap(sketch.query(outer, D), sketch.query(DenseGradient(outer.dense()), D)) < 1e-14
