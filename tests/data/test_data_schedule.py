"""Which images make up each batch."""

import numpy as np
import pytest

from clae_fast import data


def listed(schedule):
    return [(epoch, rows.tolist()) for epoch, rows in schedule]


class TestBatchSchedule:
    def test_an_epoch_is_a_permutation_that_changes(self):
        batches = list(data.BatchSchedule(10, 5, epochs=2, seed=0))
        assert [epoch for epoch, _ in batches] == [0, 0, 1, 1]
        first, second = (np.concatenate([rows for _, rows in batches[i : i + 2]]) for i in (0, 2))
        for order in (first, second):
            assert sorted(order) == list(range(10))
        assert first.tolist() != second.tolist()

    @pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 5, 8, 9])
    def test_starting_late_skips_and_changes_nothing(self, start):
        settings = {"epochs": 3, "seed": 1}
        whole = data.BatchSchedule(10, 3, **settings)
        rest = data.BatchSchedule(10, 3, **settings, start=start)
        assert whole.steps_per_epoch == 3
        assert listed(rest) == listed(whole)[start:]
        assert len(rest) == 9 - start

    @pytest.mark.parametrize("start", [0, 4])
    @pytest.mark.parametrize("steps", [1, 2, 3, 9])
    def test_blocks_are_the_batches_of_an_epoch_together(self, start, steps):
        schedule = data.BatchSchedule(10, 3, epochs=3, seed=1, start=start, rank=1, world=3)
        batches = []
        for epoch, block in schedule.blocks(steps):
            assert 1 <= len(block) <= steps
            batches += [(epoch, rows.tolist()) for rows in block]
        assert batches == listed(schedule)

    @pytest.mark.parametrize("world", [2, 4])
    def test_ranks_have_the_parts_of_each_batch(self, world):
        settings = {"epochs": 2, "seed": 1}
        parts = [
            listed(data.BatchSchedule(10, 4, **settings, rank=rank, world=world))
            for rank in range(world)
        ]
        together = [
            (found[0][0], [row for _, rows in found for row in rows])
            for found in zip(*parts, strict=True)
        ]
        assert together == listed(data.BatchSchedule(10, 4, **settings))

    @pytest.mark.parametrize(
        ("batch_size", "parts", "message"),
        [
            (11, {}, "batch_size must be at most the 10 images, got 11"),
            (0, {}, "batch_size must be positive, got 0"),
            (5, {"world": 2}, "batch_size must be divisible by the 2 processes, got 5"),
            (4, {"world": 2, "rank": 2}, "rank must be from 0 to 1, got 2"),
        ],
    )
    def test_what_cannot_be_is_named(self, batch_size, parts, message):
        with pytest.raises(ValueError, match=message):
            data.BatchSchedule(10, batch_size, epochs=1, seed=0, **parts)
