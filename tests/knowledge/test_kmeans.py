"""`kmeans` by Faiss and without it."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_lightning.knowledge import kmeans as kmeans_module
from ask_lightning.knowledge.kmeans import assign_clusters, fit_centroids, kmeans
from ask_lightning.knowledge.row_files import PairWriter
from ask_lightning.knowledge.row_shard import RowShard, ShardedRows
from ask_lightning.utilities.faiss_import import faiss_is_available
from tests.helpers.vectors import cluster, directions, faiss_as, needs_gpu, planted, same_partition

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(params=["faiss", "torch"])
def backend(request):
    if request.param == "faiss":
        pytest.importorskip("faiss")
        yield request.param
    else:
        with faiss_as(None):
            yield request.param


def centroids(vectors: torch.Tensor, num_clusters: int, seed: int) -> torch.Tensor:
    index = "auto" if faiss_is_available() else "exact"
    return fit_centroids(ShardedRows.unsharded(vectors), num_clusters, seed, index)


def spherical_means(vectors: torch.Tensor, assignment: torch.Tensor) -> np.ndarray:
    rows, numbers = vectors.double().numpy(), assignment.numpy()
    sums = np.array([rows[numbers == m].sum(axis=0) for m in range(numbers.max() + 1)])
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def objective(vectors: torch.Tensor, assignment: torch.Tensor) -> float:
    """Mean inner product of the rows with the best centroids for this assignment."""
    return float(
        (vectors.double().numpy() * spherical_means(vectors, assignment)[assignment.numpy()]).sum(1).mean()
    )


def lloyd(vectors: torch.Tensor, num_clusters: int, seed: int, iterations: int = 50) -> torch.Tensor:
    """The textbook's spherical K-means in numpy."""
    rows = vectors.double().numpy()
    centers = rows[np.random.default_rng(seed).choice(len(rows), num_clusters, replace=False)]
    for _ in range(iterations):
        numbers = (rows @ centers.T).argmax(axis=1)
        for m in set(numbers.tolist()):
            total = rows[numbers == m].sum(axis=0)
            centers[m] = total / np.linalg.norm(total)
    return torch.from_numpy(numbers)


def check_partition(assignment: torch.Tensor, rows: int, num_clusters: int) -> None:
    assert assignment.shape == (rows,)
    assert assignment.dtype == torch.int64
    assert assignment.unique().tolist() == list(range(num_clusters))


@pytest.mark.parametrize("num_clusters", [1, 2, 17, 299, 300])
def test_every_number_occurs(backend, num_clusters):
    check_partition(cluster(directions(300, 8), num_clusters), 300, num_clusters)


@pytest.mark.parametrize("num_clusters", [1, 2, 7, 39, 40])
@pytest.mark.parametrize("distinct", [1, 3, 38])
def test_no_empty_cluster_among_duplicates(backend, distinct, num_clusters):
    vectors = directions(distinct, 4)[torch.arange(40) % distinct]
    check_partition(cluster(vectors, num_clusters), 40, num_clusters)


@pytest.mark.parametrize("num_clusters", [1, 5, 30])
def test_no_empty_cluster_among_zero_rows(backend, num_clusters):
    vectors = directions(30, 4)
    vectors[10:] = 0
    check_partition(cluster(vectors, num_clusters), 30, num_clusters)
    check_partition(cluster(torch.zeros(30, 4), num_clusters), 30, num_clusters)


@PROPERTY
@given(data=st.data())
@pytest.mark.parametrize("without_faiss", [False, True])
def test_no_empty_cluster_whatever_the_rows(without_faiss, data):
    number = st.sampled_from([-1.0, 0.0, 1.0])
    row = st.lists(number, min_size=2, max_size=2)
    vectors = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=25)))
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    num_clusters, seed = data.draw(st.integers(1, len(vectors))), data.draw(st.integers(0, 3))
    if without_faiss:
        with faiss_as(None):
            assignment = cluster(vectors, num_clusters, seed)
    else:
        assignment = cluster(vectors, num_clusters, seed)
    check_partition(assignment, len(vectors), num_clusters)


def test_planted_groups_are_found(backend):
    vectors, group = planted([30, 50, 200, 40], 6)
    found = [same_partition(cluster(vectors, 4, seed), group) for seed in range(8)]
    assert sum(found) >= 2  # K-means depends on its start; that of some seeds must do


def test_as_many_clusters_as_rows_are_the_rows(backend):
    assert cluster(torch.ones(6, 3), 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_one_cluster_holds_all(backend):
    assert cluster(directions(50, 3), 1).tolist() == [0] * 50


def test_every_row_counts(backend):
    """N is far above the 256 rows per centroid that Faiss takes unless told otherwise."""
    vectors, group = planted([2000, 1500, 2500], 5, spread=0.15)
    found = next(
        (found, assignment)
        for seed in range(20)
        if same_partition(assignment := cluster(vectors, 3, seed), group)
        for found in [centroids(vectors, 3, seed)]
    )
    # Each centroid is the mean direction of all the rows of its group. Of 768 rows out of 6000 it would be
    # off by 0.15 · sqrt(1/256) ~ 0.01 in each coordinate.
    np.testing.assert_allclose(found[0].numpy(), spherical_means(vectors, found[1]), atol=1e-5)


def test_each_single_row_moves_its_centroid(backend):
    vectors, _ = planted([1000, 1000], 4)
    before = centroids(vectors, 2, 0)
    for row in (0, 511, 512, 1024, 1999):
        moved = vectors.clone()
        moved[row] = torch.nn.functional.normalize(moved[row] + torch.tensor([0.0, 0.0, 0.5, 0.5]), dim=0)
        assert not torch.allclose(centroids(moved, 2, 0), before, atol=1e-5)


@pytest.mark.parametrize("num_clusters", [3, 20])
def test_as_good_as_a_plain_lloyd(backend, num_clusters):
    vectors = torch.cat([planted([150] * 8, 12, spread=0.2)[0], directions(300, 12)])
    ours = np.mean([objective(vectors, cluster(vectors, num_clusters, seed)) for seed in range(5)])
    reference = np.mean([objective(vectors, lloyd(vectors, num_clusters, seed)) for seed in range(5)])
    assert ours > 0.98 * reference


def test_rows_belong_to_the_nearest_mean(backend):
    """The assignment is all but a fixed point of Lloyd's iteration."""
    vectors, _ = planted([300, 300, 300], 6)
    assignment = cluster(vectors, 3)
    nearest = (vectors.double().numpy() @ spherical_means(vectors, assignment).T).argmax(axis=1)
    assert (nearest == assignment.numpy()).mean() > 0.99


def test_the_seed_decides(backend):
    vectors = directions(400, 8)
    assert torch.equal(cluster(vectors, 12, 5), cluster(vectors, 12, 5))
    assert not same_partition(cluster(vectors, 12, 5), cluster(vectors, 12, 6))


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1])
def test_every_seed_of_lightning_is_allowed(backend, seed):
    check_partition(cluster(directions(50, 4), 5, seed), 50, 5)


def test_global_generators_neither_matter_nor_move(backend):
    vectors = directions(300, 8)

    def seed_everything(seed: int) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)

    def states() -> list[object]:
        numpy_state = np.random.get_state()  # noqa: NPY002
        return [torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2], random.getstate()]

    seed_everything(1)
    before = states()
    one = cluster(vectors, 9)
    assert states() == before
    seed_everything(2)
    assert torch.equal(cluster(vectors, 9), one)


def test_input_is_left_alone(backend):
    vectors = directions(100, 4)
    copy = vectors.clone()
    cluster(vectors, 7)
    assert torch.equal(vectors, copy)


def test_float64_and_discontiguous_rows(backend):
    vectors, group = planted([40, 40], 4)
    wide = vectors.double().T.contiguous().T
    assert any(same_partition(cluster(wide, 2, seed), group) for seed in range(4))


@pytest.mark.parametrize("num_clusters", [2, 30, 99])
def test_nothing_is_printed(backend, num_clusters, capfd, recwarn):
    """Faiss warns on the C level below 39 rows per centroid."""
    cluster(directions(100, 4), num_clusters)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
    assert len(recwarn) == 0


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("num_clusters", [1, 8, 199, 200])
def test_on_a_gpu(backend, num_clusters, device):
    assignment = cluster(directions(200, 8).to(device), num_clusters)
    assert assignment.device.type == "cuda"
    check_partition(assignment.cpu(), 200, num_clusters)


def euclidean_lloyd(
    vectors: torch.Tensor, start: torch.Tensor, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """The textbook's K-means in float64: the means, and the nearest mean of each row."""
    rows, means = vectors.double().numpy(), start.double().numpy().copy()

    def nearest() -> np.ndarray:
        return np.array([np.argmin([((row - mean) ** 2).sum() for mean in means]) for row in rows])

    for _ in range(iterations):
        numbers = nearest()
        means = np.array([rows[numbers == m].mean(axis=0) for m in range(len(means))])
    return means, nearest()


class TestEuclidean:
    @staticmethod
    def start(vectors: torch.Tensor, num_clusters: int, seed: int) -> torch.Tensor:
        chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:num_clusters]
        return vectors[chosen]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_means_and_clusters_are_the_textbooks(self, backend, dtype):
        if backend == "faiss" and dtype == torch.float64:
            pytest.skip("Faiss takes float32")
        vectors = directions(120, 5, dtype=dtype)
        means = fit_centroids(ShardedRows.unsharded(vectors), 6, 3, "exact", "euclidean")
        expected, numbers = euclidean_lloyd(vectors, self.start(vectors, 6, 3), 25)
        np.testing.assert_allclose(means.numpy(), expected, atol=1e-6)
        assert (means.norm(dim=1) < 0.99).all()  # means, not directions
        assert kmeans(ShardedRows.unsharded(vectors), 6, 3, "euclidean").tolist() == numbers.tolist()

    def test_what_faiss_does_from_the_same_start(self):
        faiss = pytest.importorskip("faiss")
        vectors = torch.cat([planted([150] * 6, 8, spread=0.3)[0], directions(300, 8)])
        theirs = faiss.Kmeans(8, 9, max_points_per_centroid=10**6)
        theirs.train(vectors.numpy(), init_centroids=self.start(vectors, 9, 1).numpy())
        ours = fit_centroids(ShardedRows.unsharded(vectors), 9, 1, "auto", "euclidean")
        np.testing.assert_allclose(ours.numpy(), theirs.centroids, atol=1e-5)
        _, numbers = theirs.assign(vectors.numpy())
        assert assign_clusters(ShardedRows.unsharded(vectors), ours, "auto", "euclidean").tolist() == list(
            numbers
        )

    def test_iterations_are_those_of_faiss(self):
        faiss = pytest.importorskip("faiss")
        assert kmeans_module._ITERATIONS["euclidean"] == faiss.ClusteringParameters().niter

    @pytest.mark.parametrize("num_clusters", [1, 2, 7, 39, 40])
    @pytest.mark.parametrize("distinct", [1, 3, 38])
    def test_no_empty_cluster_among_duplicates(self, backend, distinct, num_clusters):
        vectors = directions(distinct, 4)[torch.arange(40) % distinct]
        rows = ShardedRows.unsharded(vectors)
        check_partition(kmeans(rows, num_clusters, 0, "euclidean"), 40, num_clusters)


class TestManyRows:
    """Beyond a number of rows, centroids are found on samples before a last iteration over all rows."""

    @pytest.fixture(autouse=True)
    def _few_are_many(self, monkeypatch):
        monkeypatch.setattr(kmeans_module, "_ROWS_FITTED_WHOLE", 1000)
        monkeypatch.setattr(kmeans_module, "_SAMPLES", ((32, 256, 12), (128, 1024, 6)))

    @staticmethod
    def rows(count: int = 6000, width: int = 12) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        centers = torch.randn(40, width, generator=generator)
        group = torch.randint(40, (count,), generator=generator)
        noise = torch.randn(count, width, generator=generator)
        return torch.nn.functional.normalize(centers[group] + 0.6 * noise, dim=1)

    @staticmethod
    def objective(rows: torch.Tensor, assignment: torch.Tensor, clusters: int) -> float:
        sums = torch.zeros(clusters, rows.shape[1], dtype=torch.float64)
        sums.index_add_(0, assignment, rows.double())
        return float(sums.norm(dim=1).sum() / len(rows))

    def test_the_objective_is_nearly_that_of_all_rows(self, monkeypatch):
        rows = self.rows()
        sampled = kmeans(ShardedRows.unsharded(rows), 16)
        monkeypatch.setattr(kmeans_module, "_ROWS_FITTED_WHOLE", len(rows))
        whole = kmeans(ShardedRows.unsharded(rows), 16)
        assert len(sampled) == len(rows)
        assert sampled.unique().tolist() == list(range(16))
        assert self.objective(rows, sampled, 16) > 0.995 * self.objective(rows, whole, 16)

    def test_rows_in_a_file_make_the_same_clusters(self, tmp_path):
        rows = self.rows(2000).half()
        writer = PairWriter(tmp_path)
        writer.append_stored(rows, rows)
        files = writer.finish()
        table = ShardedRows(files.audio.mapped, RowShard.unsharded(len(rows)), files.audio)
        assert torch.equal(kmeans(table, 16), kmeans(ShardedRows.unsharded(rows.float()), 16))
