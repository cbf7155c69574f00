import pytest

pytest.importorskip("transformers")

from batch import largest, table


@pytest.mark.parametrize("budget", [1, 19, 20, 21, 100, 555, 10_000])
@pytest.mark.parametrize("bend", [0, 1, 7])
def test_the_largest_batch_fits_and_the_next_one_does_not(budget: int, bend: int) -> None:
    tried: list[int] = []

    def holds(batch: int) -> int:
        tried.append(batch)
        return 10 + 9 * batch + min(batch * bend, 40)

    found = largest(holds, budget, first=2, none=8)
    assert found == max((b for b in range(1, 2000) if holds(b) <= budget), default=0)


def test_few_batches_are_tried_where_bytes_are_a_line() -> None:
    tried: list[int] = []

    def holds(batch: int) -> int:
        tried.append(batch)
        return 80 + 11 * batch

    assert largest(holds, 1000, first=2, none=80) == 83
    assert tried == [2, 83, 84]


def test_throughput_is_by_eagers_own_batch() -> None:
    eager = {"batch": 2, "eager_batch": 2, "peak": 100 * 10**6, "pairs": [[1.0, 1.0, 1.0, 1.0]]}
    row = {"batch": 8, "eager_batch": 2, "peak": 99 * 10**6, "pairs": [[1.0, 9.0, 1.0, 5.0]]}
    text = table({"m": {"eager": eager, "memplan": row, "inductor": {"batch": 0}}})
    assert "| m | memplan | 8 | 4.0 | 99.0 | 99.0% | 1.60 | 0.80 |" in text
    assert "| m | inductor | 0 |" in text
