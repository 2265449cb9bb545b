"""A knowledge base whose rows are sharded over real processes, against one process that has them all."""

import pickle
import re

import pytest
import torch
from torch import Tensor

from ask_lightning import KnowledgeBase, ReliabilityOTLoss
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.knowledge.sharded_pairs import ShardedPairs
from ask_lightning.knowledge.snapshot_file import SnapshotError
from ask_lightning.utilities.distributed import Ranks
from tests.helpers.ranks import on_ranks
from tests.helpers.sharded_bases import WIDTH, build, directions, shard_of, source

K = 10
BATCHES = (7, 12, 9, 5)  # of the ranks


def queries(rank: int) -> tuple[Tensor, Tensor]:
    return directions(BATCHES[rank], WIDTH, 50 + rank), directions(BATCHES[rank], WIDTH, 60 + rank)


def look_up(base: KnowledgeBase, rank: int) -> dict[str, Tensor]:
    """Everything that a rank gets out of a base for its batch."""
    audio, text = queries(rank)
    k = min(K, len(base.fine))
    found = base.lookup(audio, text, k)
    results = {
        f"{name} {field}": value for name, hood in found.items() for field, value in vars(hood).items()
    }
    if len(base.fine) > K + 5:
        own = [f"{number}.wav" for number in range(len(audio))]
        results["excluded"] = base.lookup(audio, text, k, exclude_ids=own)["fine"].audio_rows
    clips = len(base.ids.unique())
    distinct = base.lookup(audio, text, min(K, clips), distinct_clips=True)["fine"]
    results |= {"distinct audio_rows": distinct.audio_rows, "distinct text_rows": distinct.text_rows}
    audio.requires_grad_()
    loss = ReliabilityOTLoss(num_neighbors=k)(audio, text, knowledge=base)
    loss.backward()
    assert audio.grad is not None
    return results | {"loss": loss.detach(), "gradient": audio.grad}


def both_placements(rows: int, kind: str, options: dict) -> dict:
    rank = torch.distributed.get_rank()
    results = {}
    for placement in ("replicated", "sharded"):
        base = build(rows, kind, placement=placement, **options)
        assert base.is_sharded == (placement == "sharded")
        results[placement] = {
            "fingerprint": base.fingerprint,
            "ids": base.ids,
            "coarse": base.coarse.audio,
            "bytes": base.num_bytes - base.coarse.audio.nbytes - base.coarse.text.nbytes,
            "mean": base.fine.mean[0],
            "repr": repr(base),
            "found": look_up(base, rank),
        }
        if placement == "replicated":
            results["fine"] = (base.fine.audio, base.fine.text)
    return results


@pytest.mark.parametrize(
    ("size", "rows", "kind", "options"),
    [
        (2, 101, "interleaved", {}),
        (3, 100, "interleaved", {"prototype_pairing": "joint"}),
        (4, 102, "contiguous", {"prototype_pairing": "text"}),
        (2, 100, "five at a time", {}),
        (4, 3, "interleaved", {}),  # fewer rows than ranks
        (2, 101, "interleaved", {"clustering": "euclidean"}),
        (2, 101, "interleaved", {"index": "Flat"}),
        (2, 101, "interleaved", {"storage": "float16"}),
        (2, 101, "interleaved", {"storage": "bfloat16", "index": "exact"}),
    ],
    ids=str,
)
def test_both_placements_are_one_process(size, rows, kind, options):
    if "index" in options:
        pytest.importorskip("faiss")
    captions = 5 if kind == "five at a time" else 1
    audio, text, ids = source(rows, captions)
    alone = KnowledgeBase.from_embeddings(audio, text, ids=ids, **{"num_prototypes": min(8, rows), **options})
    results = on_ranks(size, both_placements, rows, kind, options)
    for rank, result in enumerate(results):
        assert torch.equal(result["fine"][0], alone.fine.audio)
        assert torch.equal(result["fine"][1], alone.fine.text)
        expected = look_up(alone, rank)
        for placement in ("replicated", "sharded"):
            got = result[placement]
            assert torch.equal(got["ids"], alone.ids)
            torch.testing.assert_close(got["coarse"], alone.coarse.audio)
            torch.testing.assert_close(got["mean"], alone.fine.mean[0])
            assert got["fingerprint"] == results[0]["replicated"]["fingerprint"]
            assert f"{rows} pairs" in got["repr"]
            for name, value in expected.items():
                if name.endswith("_rows") or name == "excluded":
                    assert torch.equal(got["found"][name], value), name
                torch.testing.assert_close(got["found"][name], value)
        # The two placements agree to the last bit.
        for name, value in result["replicated"]["found"].items():
            assert torch.equal(result["sharded"]["found"][name], value), name
        share = -(-rows // size) if kind == "interleaved" else None
        if share:
            assert result["sharded"]["bytes"] <= share * WIDTH * 2 * alone.fine.audio.element_size()
    assert sum(result["sharded"]["bytes"] for result in results) == alone.fine.audio.nbytes * 2


def large_batches() -> list[bool]:
    """Whether both placements agree to the last bit for a batch that Faiss's kernel would take."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    audio, text = torch.nn.functional.normalize(torch.randn(2, 130, WIDTH, generator=generator), dim=2)
    one, other = (build(3005, "five at a time", placement=place) for place in ("replicated", "sharded"))
    found, same = one.lookup(audio, text, K)["fine"], other.lookup(audio, text, K)["fine"]
    return [torch.equal(rows, vars(same)[name]) for name, rows in vars(found).items()]


def test_large_batches_agree_to_the_last_bit():
    assert on_ranks(2, large_batches) == [[True] * 6] * 2


def drift() -> tuple[Tensor, Tensor]:
    rows = torch.arange(0, 101, 7)
    drifts = []
    for placement in ("replicated", "sharded"):
        now, then = (
            build(101, "interleaved", placement=placement, num_prototypes=2),
            KnowledgeBase.from_embeddings(
                directions(101, WIDTH, 8)[shard_of(101, "interleaved").global_rows()],
                directions(101, WIDTH, 9)[shard_of(101, "interleaved").global_rows()],
                num_prototypes=2,
                placement=placement,
                shard=shard_of(101, "interleaved"),
            ),
        )
        assert now.has_same_rows_as(then)
        drifts.append(torch.stack(now.fine.drift_from(then.fine, rows)))
    return tuple(drifts)


def test_drift_is_the_same_wherever_the_rows_are():
    for replicated, sharded in on_ranks(3, drift):
        assert float(replicated.min()) > 0
        torch.testing.assert_close(sharded, replicated, rtol=1e-5, atol=1e-7)


def spoil_and_build(which: str) -> str:
    rank = torch.distributed.get_rank()
    shard = RowShard.interleaved(20, Ranks.current())
    audio, text, _ = (side[shard.global_rows()] if isinstance(side, Tensor) else side for side in source(20))
    if which == "nan" and rank == 1:
        audio[2, 3] = torch.nan  # source row 2 * 2 + 1
    if which == "width" and rank == 1:
        audio, text = audio[:, :8], text[:, :8]
    try:
        KnowledgeBase.from_embeddings(audio, text, num_prototypes=3, shard=shard)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("which", "text"),
    [
        ("nan", r"audio embeddings of 1 of 20 source rows contain NaN or Inf \(rows 5\)"),
        ("width", "same shape"),
    ],
)
def test_what_is_wrong_on_one_rank_is_an_error_on_all(which, text):
    for message in on_ranks(2, spoil_and_build, which):
        assert re.search(text, message), message


def write(folder: str) -> str:
    base = build(101, "interleaved", placement="sharded")
    files = base.save(f"{folder}/sharded.safetensors")
    torch.distributed.barrier()
    assert all(file.is_file() for file in files)
    assert len(files) == 2
    replicated = build(101, "interleaved")
    if torch.distributed.get_rank() == 0:
        replicated.save(f"{folder}/whole.safetensors")
    torch.distributed.barrier()
    return base.fingerprint


def few_queries() -> dict[str, Tensor]:
    """Neighbours of no, one and several queries among wide rows of which five at a time are equal."""
    rank = torch.distributed.get_rank()
    shard = RowShard.interleaved(101, Ranks.current())
    sides = [
        directions(21, 1024, seed).repeat_interleave(5, dim=0)[:101][shard.global_rows()] for seed in (3, 4)
    ]
    found = {}
    for placement in ("replicated", "sharded"):
        base = KnowledgeBase.from_embeddings(*sides, num_prototypes=4, shard=shard, placement=placement)
        rows = []
        for seed, batches in enumerate([(0, 3), (0, 0), *[(1, 2), (1, 1)] * 5]):
            queries = [directions(batches[rank], 1024, 100 * seed + 10 * rank + side) for side in (0, 1)]
            with torch.no_grad():
                hood = base.lookup(*queries, 12)["fine"]
            assert hood.text_by_audio.shape == (batches[rank], 12, 1024)
            rows += [hood.audio_rows, hood.text_rows]
        found[placement] = torch.cat(rows)
    return found


def test_batches_of_no_query_and_of_one():
    for found in on_ranks(2, few_queries):
        assert torch.equal(found["replicated"], found["sharded"])


def indexes(path: str) -> list[str]:
    bases = [KnowledgeBase.load(path, ranks=ranks) for ranks in (None, Ranks.current())]
    return [base.fine.index for base in bases]


def test_what_one_process_has_written_is_searched_alike_by_many(tmp_path):
    audio, text, ids = source(20)
    base = KnowledgeBase.from_embeddings(audio, text, ids=ids, num_prototypes=4)
    base.save(tmp_path / "base.safetensors")
    assert base.fine.index == KnowledgeBase.load(tmp_path / "base.safetensors").fine.index == "auto"
    for found in on_ranks(2, indexes, str(tmp_path / "base.safetensors")):
        assert found == ["exact", "exact"]


def read(folder: str) -> list[tuple]:
    found = []
    for name in ("sharded", "whole"):
        for ranks in (None, Ranks.current()):
            base = KnowledgeBase.load(f"{folder}/{name}.safetensors", ranks=ranks)
            assert isinstance(base.fine, ShardedPairs) == (ranks is not None)
            found.append((base.fingerprint, base.is_sharded, look_up(base, 0)["loss"]))
    return found


def test_snapshots_are_read_by_any_number_of_ranks(tmp_path):
    fingerprint, _ = on_ranks(2, write, str(tmp_path))
    alone = KnowledgeBase.load(tmp_path / "sharded.safetensors")
    expected = look_up(alone, 0)["loss"]
    assert alone.fingerprint == fingerprint
    for results in on_ranks(3, read, str(tmp_path)):
        for found, _, loss in results:
            assert found == fingerprint
            assert torch.equal(loss, expected)
    second = tmp_path / "sharded.shard-1-of-2.safetensors"
    content = bytearray(second.read_bytes())
    content[-9] ^= 1
    second.write_bytes(content)
    with pytest.raises(
        SnapshotError, match=r"shard-1-of-2.*checksum of .* is another than when it was written"
    ):
        KnowledgeBase.load(tmp_path / "sharded.safetensors")
    second.unlink()
    with pytest.raises(SnapshotError, match=r"lacks sharded\.shard-1-of-2\.safetensors"):
        KnowledgeBase.load(tmp_path / "sharded.safetensors")


def pickle_it() -> str:
    try:
        pickle.dumps(build(20, "interleaved", placement="sharded").fine)
    except TypeError as error:
        return str(error)
    return ""


def test_a_shard_does_not_travel():
    assert "Save it instead" in on_ranks(2, pickle_it)[0]
