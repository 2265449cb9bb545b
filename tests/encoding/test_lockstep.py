"""All ranks take as many steps as the one with most batches, whatever each of them has."""

import pytest

from ask_lightning.encoding.lockstep import Lockstep
from ask_lightning.utilities.distributed import Ranks
from tests.helpers.ranks import on_ranks


def failing_after(batches: list):
    yield from batches
    raise ValueError("a broken file")


def steps_of(batches: list[list], stop_after: int | None = None) -> list:
    """Batches and whether they are own ones, on this rank."""
    ranks, seen = Ranks.current(), []
    steps = Lockstep(iter(batches[ranks.rank]), ranks)
    for batch in steps:
        seen.append((batch, steps.is_own))
        if len(seen) == stop_after and ranks.rank == 0:
            steps.finish()
    return seen


def error_of(failing_rank: int) -> tuple[str, str]:
    ranks = Ranks.current()
    batches = failing_after([1]) if ranks.rank == failing_rank else iter([1, 2, 3])
    try:
        list(Lockstep(batches, ranks))
    except (ValueError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "", ""


def error_of_what_came_of_a_batch(failing_rank: int) -> tuple[str, int]:
    """And the number of batches that this rank had."""
    ranks, count = Ranks.current(), 0
    steps = Lockstep(iter([1, 2, 3]), ranks)
    try:
        for _ in steps:
            count += 1
            if ranks.rank == failing_rank:
                steps.fail(OSError("the disk is full"))
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", count
    return "", count


def keys_seen() -> list:
    """The keys of each step's batch, which is changed in place, as hooks of a model may do it."""
    ranks, seen = Ranks.current(), []
    batches = [{"wave": 1}, {"wave": 2}] if ranks.rank == 0 else []
    for batch in Lockstep(iter(batches), ranks):
        seen.append(list(batch))
        batch["audio"] = batch.pop("wave")
    return seen


def cases() -> list:
    return [
        steps_of([[1, 2, 3], [4]]),
        steps_of([[], [4, 5]]),
        steps_of([[], []]),
        steps_of([[1, 2, 3], [4, 5]], stop_after=1),
        error_of(1),
        keys_seen(),
        error_of_what_came_of_a_batch(1),
    ]


@pytest.fixture(name="seen", scope="module")
def seen_fixture():
    return list(zip(*on_ranks(2, cases), strict=True))


def test_a_rank_without_a_batch_repeats_its_last(seen):
    assert seen[0] == ([(1, True), (2, True), (3, True)], [(4, True), (4, False), (4, False)])


def test_a_rank_that_never_had_a_batch_gets_that_of_another(seen):
    assert seen[1] == ([(4, False), (4, False)], [(4, True), (5, True)])


def test_no_batches(seen):
    assert seen[2] == ([], [])


def test_a_rank_that_has_enough_goes_on_with_the_others(seen):
    assert seen[3] == ([(1, True), (1, False)], [(4, True), (5, True)])


def test_a_batch_that_comes_again_is_as_it_was_read(seen):
    assert seen[5] == ([["wave"], ["wave"]], [["wave"], ["wave"]])


def test_an_error_ends_all(seen):
    other, own = seen[4]
    assert own == ("ValueError", "a broken file")
    assert other[0] == "RuntimeError"
    assert "Rank 1 failed while encoding the knowledge source. ValueError: a broken file" in other[1]


def test_what_came_of_a_batch_ends_all_at_the_next_step(seen):
    other, own = seen[6]
    assert own == ("OSError: the disk is full", 1)
    told = "RuntimeError: Rank 1 failed while encoding the knowledge source. OSError: the disk is full"
    assert other == (told, 1)


def test_one_process():
    steps = Lockstep(iter("ab"), Ranks())
    assert [(batch, steps.is_own) for batch in steps] == [("a", True), ("b", True)]
    with pytest.raises(ValueError, match="a broken file"):
        list(Lockstep(failing_after([1]), Ranks()))
    steps = Lockstep(iter("ab"), Ranks())
    batches = iter(steps)
    assert next(batches) == "a"
    steps.fail(OSError("the disk is full"))
    with pytest.raises(OSError, match="the disk is full"):
        next(batches)
