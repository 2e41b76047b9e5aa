"""Which logits a metric reads is found out, whatever the metric does, and what it reads beyond that is caught."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from intervenable.errors import MetricError
from intervenable.metric_canvas import Canvas
from intervenable.metric_reading import MetricReader, UnreadError

BATCH, LENGTH, SIZE = 2, 5, 2050


def run_of(seed: int, shape: tuple[int, int, int] = (BATCH, LENGTH, SIZE)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Probes:
    """Unpatched runs, and which positions of them were asked for."""

    def __init__(self, *runs: Tensor) -> None:
        self.runs = runs
        self.asked: list[list[int] | None] = []

    def each(self) -> list[Callable[[Tensor | None], Tensor]]:
        return [lambda positions, run=run: self._give(run, positions) for run in self.runs]

    def _give(self, run: Tensor, positions: Tensor | None) -> Tensor:
        self.asked.append(None if positions is None else positions.tolist())
        return run if positions is None else run[:, positions]


def reader_of(
    metric: Callable[[Tensor], object],
    *runs: Tensor,
    guess: Sequence[int] = (LENGTH - 1,),
    narrow: bool = True,
) -> MetricReader:
    runs = runs or (run_of(0), run_of(1))
    shape = tuple(runs[0].shape)
    return MetricReader({"metric": metric}, shape, Probes(*runs).each(), guess=guess, narrow=narrow)


def known(reader: MetricReader, logits: Tensor) -> Tensor:
    """The part of logits that a reader asks for."""
    part = logits[:, reader.positions]
    return part if reader.tokens is None else part[..., reader.tokens]


def found(reader: MetricReader) -> tuple[list[int], list[int] | None]:
    return reader.positions.tolist(), None if reader.tokens is None else reader.tokens.tolist()


# --- what is found -----------------------------------------------------------------------------------------


def linear(row: int, position: int, tokens: list[int]) -> Callable[[Tensor], object]:
    return lambda z: sum(weight * z[row, position, token] for weight, token in enumerate(tokens, 1))


def largest(row: int, position: int, tokens: list[int]) -> Callable[[Tensor], object]:
    return lambda z: z[row, position, tokens].max()


def smallest_sorted(row: int, position: int, tokens: list[int]) -> Callable[[Tensor], object]:
    return lambda z: z[row, position, tokens].sort().values[0]


def by_python(row: int, position: int, tokens: list[int]) -> Callable[[Tensor], object]:
    return lambda z: max(z[row, position, token].item() for token in tokens)


def by_numpy(row: int, position: int, tokens: list[int]) -> Callable[[Tensor], object]:
    return lambda z: float(z[row, position, tokens].numpy().max())


def ahead(row: int, position: int, tokens: list[int]) -> Callable[[Tensor], object]:
    return lambda z: z[row, position, tokens[0]] > z[row, position, tokens[-1]] + 0.1


def rank(row: int, position: int, tokens: list[int]) -> Callable[[Tensor], object]:
    return lambda z: (z[row, position] > z[row, position, tokens[0]]).sum()


def softmax(row: int, position: int, tokens: list[int]) -> Callable[[Tensor], object]:
    return lambda z: z[row, position].softmax(-1)[tokens[0]]


def winner(row: int, position: int, tokens: list[int]) -> Callable[[Tensor], object]:
    return lambda z: z[row, position].argmax() == tokens[0]


OF_TOKENS = [linear, largest, smallest_sorted, by_python, by_numpy, ahead]
OF_ALL = [rank, softmax, winner]
READS = st.tuples(
    st.sampled_from(OF_TOKENS + OF_ALL),
    st.integers(0, BATCH - 1),
    st.integers(0, LENGTH - 1),
    st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=4, unique=True),
)


@settings(max_examples=60, deadline=None)
@given(
    reads=st.lists(READS, min_size=1, max_size=3),
    guess=st.sets(st.integers(0, LENGTH - 1), min_size=1),
    seed=st.integers(0, 1000),
)
def test_what_is_found_is_what_a_metric_of_random_reads_really_reads(reads, guess, seed):
    parts = [kind(row, position, tokens) for kind, row, position, tokens in reads]
    positions = sorted({position for _, _, position, _ in reads})
    tokens = None
    if not any(kind in OF_ALL for kind, *_ in reads):
        # A comparison of a number with itself is known to nobody but by looking.
        tokens = sorted({token for kind, _, _, all_of in reads for token in _read_by(kind, all_of)})

    def metric(z: Tensor) -> Tensor:
        return torch.stack([torch.as_tensor(part(z)).float() for part in parts])

    reader = reader_of(metric, run_of(seed), run_of(seed + 1), guess=sorted(guess))

    assert found(reader) == (positions, tokens)
    patched = run_of(seed + 2)
    assert torch.equal(reader.measure(known(reader, patched), "a cell")["metric"], metric(patched))


def _read_by(kind: object, tokens: list[int]) -> list[int]:
    return [tokens[0], tokens[-1]] if kind is ahead else tokens


@pytest.mark.parametrize(
    ("metric", "positions", "tokens"),
    [
        (lambda z: z.log_softmax(-1)[0, 2, 7], [2], None),  # of everything, and one position of it is used
        (lambda z: z[0].softmax(0)[1, 3], [0, 1, 2, 3, 4], [3]),
        (lambda z: z.argmax(-1)[0, 2], [0, 1, 2, 3, 4], None),  # nobody sees that the others are thrown away
        (lambda z: (z.argmax(-1) == torch.arange(LENGTH)).float().mean(), [0, 1, 2, 3, 4], None),
        (lambda z: z[:, [1, 3]][..., [5, 2049]].sum(), [1, 3], [5, 2049]),
        (lambda z: (z[0, 0, 5] > 0) | (z[0, 1, 5] > 0), [0, 1], [5]),  # each alone may be no matter
        (lambda z: z[0, 0, 4].nan_to_num(), [0], [4]),
        (lambda z: torch.fmax(z[0, 1, 4], torch.zeros(())), [1], [4]),
        (lambda z: z[0, 1, 4].clone().gt_(z[0, 1, 5]), [1], [4, 5]),
        (lambda z: z[0, 3, 9].sign(), [3], [9]),
        (lambda z: z[0, 3, [9, 11]].nansum(), [3], [9, 11]),
        (lambda z: float(f"{z[0, 3, 9]:.2f}"), [3], [9]),
        (lambda z: len((z[0, 3, :20] > 0).nonzero()), [3], list(range(20))),
        (lambda z: z[0, 2, :3].tolist()[1], [2], [0, 1, 2]),
        (lambda z: np.asarray(z[1, 2])[17], [2], None),
        (lambda z: z.data[0, 2, 3], [2], [3]),
        (lambda z: 7, [4], [0]),  # reads nothing: there is always one position and one token
        (lambda z: torch.zeros_like(z[0, :, 0], dtype=torch.int).sum(), [4], [0]),
        (lambda z: 0 * z[0, 2, 3], [2], [3]),
        # What makes numbers of NaN in a way that nobody thought of is given everything.
        (lambda z: torch.copysign(torch.ones(()), z[0, 3, 9] + 100), [0, 1, 2, 3, 4], None),
        (lambda z: z[0, 4, :257].sum(), [4], None),  # too many to be worth it
        (lambda z: z[0, 4, :256].sum(), [4], list(range(256))),
    ],
)
def test_a_metric_reads(metric, positions, tokens):
    reader = reader_of(metric)
    assert found(reader) == (positions, tokens)
    patched = run_of(2)
    value = reader.measure(known(reader, patched), "a cell")["metric"]
    assert torch.equal(value, torch.as_tensor(metric(patched)).float())


def test_only_the_guess_is_asked_for_where_it_is_all_that_is_read():
    probes = Probes(run_of(0), run_of(1))
    metrics = {"one": lambda z: z[0, 3, 5], "two": lambda z: z[1, 4].logsumexp(-1)}
    reader = MetricReader(metrics, (BATCH, LENGTH, SIZE), probes.each(), guess=[3, 4], narrow=True)
    assert found(reader) == ([3, 4], None)
    assert probes.asked == [[3, 4], [3, 4]]


def test_all_positions_of_a_run_are_asked_for_once_where_the_guess_is_wrong():
    probes = Probes(run_of(0), run_of(1))
    reader = MetricReader(
        {"m": lambda z: z[0, 1, 5]}, (BATCH, LENGTH, SIZE), probes.each(), guess=[4], narrow=True
    )
    assert found(reader) == ([1], [5])
    assert probes.asked == [[4], None, [1]]


def test_what_is_read_is_what_any_of_the_runs_reads():
    def metric(z: Tensor) -> Tensor:
        return z[0, 1, 7] if z[0, 0, 3].item() > 0 else z[0, 2, 8]

    above, below = run_of(0), run_of(1)
    above[0, 0, 3], below[0, 0, 3] = 1.0, -1.0
    assert found(reader_of(metric, above)) == ([0, 1], [3, 7])
    assert found(reader_of(metric, above, below)) == ([0, 1, 2], [3, 7, 8])
    assert found(reader_of(metric, below, above)) == ([0, 1, 2], [3, 7, 8])


def test_tokens_are_not_asked_about_in_a_small_vocabulary_or_where_nobody_wants_them():
    small = [run_of(seed, (1, 3, 2047)) for seed in (0, 1)]
    assert found(reader_of(lambda z: z[0, 2, 5], *small, guess=[2])) == ([2], None)
    assert found(reader_of(lambda z: z[0, 2, 5], narrow=False)) == ([2], None)


def test_several_metrics_are_read_together_and_answer_by_name():
    metrics = {"a": lambda z: z[0, 1, 5], "b": lambda z: z[:, 3, 6]}
    reader = MetricReader(metrics, (BATCH, LENGTH, SIZE), Probes(run_of(0)).each(), guess=[4], narrow=True)
    assert found(reader) == ([1, 3], [5, 6])
    assert reader.shapes == {"a": torch.Size([]), "b": torch.Size([2])}
    patched = run_of(3)
    values = reader.measure(known(reader, patched), "a cell")
    assert_close(values, {"a": patched[0, 1, 5], "b": patched[:, 3, 6]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_other_precision_are_read_alike(dtype):
    runs = [run_of(seed).to(dtype) for seed in (0, 1)]
    reader = reader_of(lambda z: z[0, 2, 5] - z[1, 3, 6], *runs)
    assert found(reader) == ([2, 3], [5, 6])
    value = reader.measure(known(reader, runs[0]), "a cell")["metric"]
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.item() == (runs[0][0, 2, 5] - runs[0][1, 3, 6]).item()


def test_nan_at_positions_that_are_not_read_is_no_matter():
    run = run_of(0)
    run[0, 0] = torch.nan  # as some models give where there is padding
    reader = reader_of(lambda z: z[0, 1, 5], run, guess=[4])
    assert found(reader) == ([1], [5])


def test_a_metric_that_looks_at_nan_of_the_model_is_given_everything():
    run = run_of(0)
    run[0, 0] = torch.nan
    metric = lambda z: z.argmax(-1)[0, 1]  # noqa: E731
    reader = reader_of(metric, run)
    assert found(reader) == ([0, 1, 2, 3, 4], None)
    assert reader.measure(run, "a cell")["metric"] == run[0, 1].argmax()


def test_a_metric_that_cannot_be_watched_is_given_everything():
    def metric(z: Tensor) -> Tensor:
        if torch._C._len_torch_dispatch_stack() > 0:
            raise RuntimeError("not while somebody looks")
        return z[0, 1, 5]

    reader = reader_of(metric)
    assert found(reader) == ([0, 1, 2, 3, 4], None)
    assert reader.measure(run_of(2), "a cell")["metric"] == run_of(2)[0, 1, 5]


# --- metrics that do more than read --------------------------------------------------------------------------


def measured(metric: Callable[[Tensor], object]) -> tuple[list[Tensor], list[Tensor]]:
    """The values of three cells, and the logits of these."""
    reader = reader_of(metric)
    cells = [run_of(seed) for seed in (5, 6, 7)]
    return [reader.measure(known(reader, cell), "a cell")["metric"] for cell in cells], cells


def test_a_metric_may_keep_the_logits_it_was_given():
    kept: list[Tensor] = []

    def metric(z: Tensor) -> Tensor:
        kept.append(z)
        return z[0, 4, 5]

    _, cells = measured(metric)
    for given_then, cell in zip(kept[-3:], cells, strict=True):
        assert given_then[0, 4, 5] == cell[0, 4, 5]


def test_a_metric_may_keep_a_view_of_them_as_an_array():
    kept: list[np.ndarray] = []

    def metric(z: Tensor) -> float:
        kept.append(z[0, 4, 5:6].numpy())
        return float(kept[-1][0])

    _, cells = measured(metric)
    assert [array[0] for array in kept[-3:]] == [cell[0, 4, 5].item() for cell in cells]


def in_place(z: Tensor) -> Tensor:
    return z.mul_(2)[0, 4, 5] + 0


def in_place_by_index(z: Tensor) -> Tensor:
    z[0, 4, 5] *= 2
    return z[0, 4, 5] + 0


def in_place_as_data(z: Tensor) -> Tensor:
    z.data[0, 4, 5] = 2 * z[0, 4, 5]
    return z[0, 4, 5] + 0


def in_place_as_array(z: Tensor) -> float:
    array = z[0, 4].numpy()
    array[5] *= 2
    return float(array[5])


@pytest.mark.parametrize("metric", [in_place, in_place_by_index, in_place_as_data, in_place_as_array])
def test_a_metric_may_write_into_the_logits_it_was_given(metric):
    values, cells = measured(metric)
    assert values == [2 * cell[0, 4, 5] for cell in cells]
    before = cells[0].clone()
    reader = reader_of(metric)
    reader.measure_whole(cells[0], "a cell")
    assert torch.equal(cells[0], before)


@pytest.mark.parametrize("writes", [in_place, in_place_as_data, in_place_as_array])
def test_a_metric_that_writes_does_not_change_what_the_next_one_sees(writes):
    metrics = {"first": writes, "second": lambda z: z[0, 4, 5]}
    reader = MetricReader(metrics, (BATCH, LENGTH, SIZE), Probes(run_of(0)).each(), guess=[4], narrow=True)
    cell = run_of(3)
    for values in (reader.measure(known(reader, cell), "a cell"), reader.measure_whole(cell, "a cell")):
        assert values == {"first": 2 * cell[0, 4, 5], "second": cell[0, 4, 5]}


def test_what_is_read_is_found_though_the_metric_wipes_it_out_unseen():
    def metric(z: Tensor) -> float:
        array = z[0, 4, 5:7].numpy()
        value = float(array.sum())
        array[:] = 0
        return value

    assert found(reader_of(metric)) == ([4], [5, 6])


def test_a_value_that_is_a_view_of_the_logits_stays_what_it_was():
    values, cells = measured(lambda z: z[0, 4, 5:8])
    assert [value.tolist() for value in values] == [cell[0, 4, 5:8].tolist() for cell in cells]


def test_a_value_that_a_metric_goes_on_writing_into_stays_what_it_was():
    total = torch.zeros(())
    values, cells = measured(lambda z: total.zero_().add_(z[0, 4, 5]))
    assert values == [cell[0, 4, 5] for cell in cells]


def test_other_memory_is_shown_only_after_the_logits_were_kept_or_changed():
    canvas = Canvas((1, 2, 3), torch.zeros(1))
    first = canvas.tensor
    canvas.show(lambda z: z[0, 0, 1] - z[0, 0, 2])
    assert canvas.tensor is first
    canvas.show(lambda z: z.add_(1))
    assert canvas.tensor is not first
    second, kept = canvas.tensor, []
    canvas.show(lambda z: kept.append(z[0]))
    assert canvas.tensor is not second


def test_no_gradients_are_kept():
    reader = reader_of(lambda z: z[0, 4, 5] * torch.ones((), requires_grad=True))
    logits = run_of(3).requires_grad_()
    for value in (reader.measure(known(reader, logits), "a cell"), reader.measure_whole(logits, "a cell")):
        assert not value["metric"].requires_grad


def test_readers_in_two_threads_do_not_disturb_each_other():
    wrong: list[object] = []

    def work(position: int) -> None:
        for seed in range(6):
            reader = reader_of(lambda z: z[0, position, 5] + (z[0, position, 6] > 0), run_of(seed))
            patched = run_of(seed + 50)
            value = reader.measure(known(reader, patched), "a cell")["metric"]
            if found(reader) != ([position], [5, 6]) or value != patched[0, position, 5] + (
                patched[0, position, 6] > 0
            ):
                wrong.append(found(reader))

    threads = [threading.Thread(target=work, args=(position,)) for position in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch._C._len_torch_dispatch_stack() == 0


# --- reading something else than before ----------------------------------------------------------------------


def by_branch(z: Tensor) -> Tensor:
    return z[0, 1, 7] if z[0, 0, 3] > 0 else z[0, 2, 8]


def by_branch_that_hides_it(z: Tensor) -> Tensor:
    return z[0, 1, 7] > 0 if z[0, 0, 3] > 0 else z[0, 2, 8] > 100


def by_index(z: Tensor) -> Tensor:
    return z[0, 1 + (z[0, 0, 3] <= 0).long(), 7]


def by_index_that_hides_it(z: Tensor) -> Tensor:
    return z[0, 1 + (z[0, 0, 3] <= 0).long(), 7] > 100


def by_indices_that_hide_it(z: Tensor) -> Tensor:
    return z[0, 1 + (z[0, 0, 3:4] <= 0).long(), 7] > 100


def by_count_that_hides_it(z: Tensor) -> Tensor:
    return z[0, 1, 7] > 100 if len((z[0, 0, 3:4] > 0).nonzero()) else z[0, 2, 7] > 100


def by_where(z: Tensor) -> Tensor:
    return (
        torch.where(z[0, 0, 3] > 0, z[0, 1, 7], z[0, 2, 7]).argmax() * 0 + z[0, 1 + int(z[0, 0, 3] <= 0), 7]
    )


def by_shape(z: Tensor) -> Tensor:
    return z[0, 1, 7:8][z[0, 0, 3:4] > 0] if z[0, 0, 3] > 0 else z[0, 2, 8:10]


def that_fails_on_nan(z: Tensor) -> float:
    return math.sqrt(abs(z[0, 1, 7].item() if z[0, 0, 3] > 0 else round(z[0, 2, 8].item())))


@pytest.mark.parametrize(
    "metric",
    [
        by_branch,
        by_branch_that_hides_it,
        by_index,
        by_index_that_hides_it,
        by_indices_that_hide_it,
        by_count_that_hides_it,
        by_where,
        by_shape,
        that_fails_on_nan,
    ],
)
def test_a_cell_in_which_a_metric_reads_something_else_is_not_believed(metric):
    unpatched, same, other = run_of(0), run_of(1), run_of(2)
    unpatched[0, 0, 3], same[0, 0, 3], other[0, 0, 3] = 1.0, 2.0, -1.0
    reader = reader_of(metric, unpatched)
    assert reader.positions.tolist() == [0, 1]
    assert reader.measure(known(reader, same), "layer 1, pos 1")["metric"] == metric(same)
    with pytest.raises(UnreadError) as error:
        reader.measure(known(reader, other), "layer 3, pos 2")
    assert error.value.cell == "layer 3, pos 2"
    if metric is not by_shape:
        assert reader.measure_whole(other, "layer 3, pos 2")["metric"] == metric(other)
    # Nothing of it is left for the next cell.
    assert reader.measure(known(reader, same), "layer 1, pos 1")["metric"] == metric(same)


def test_a_metric_that_is_nan_in_a_patched_run_is_reported_with_its_cell():
    reader = reader_of(lambda z: torch.stack([z[0, 1, 7].log(), z[0, 1, 8]]), run_of(0).abs() + 1)
    cell = run_of(1).abs() + 1
    cell[0, 1, 7] = -1
    cell[0, 1, 8] = 0.5
    with pytest.raises(UnreadError):
        reader.measure(known(reader, cell), "layer 3, pos 2")
    with pytest.raises(MetricError) as error:
        reader.measure_whole(cell, "layer 3, pos 2")
    assert str(error.value) == (
        "The metric 'metric' is NaN at layer 3, pos 2 ([nan, 0.5]), where all logits are numbers. Look at what it"
        " divides by, and at infinities that it subtracts."
    )
    cell[0, 1, 7] = torch.nan
    with pytest.raises(MetricError) as error:
        reader.measure_whole(cell, "layer 3, pos 2")
    assert "some of the logits are NaN: the model gave them." in str(error.value)


def test_a_metric_of_another_shape_in_a_patched_run_is_reported_with_its_cell():
    reader = reader_of(by_shape, run_of(0).abs())
    with pytest.raises(MetricError) as error:
        reader.measure_whole(-run_of(0).abs(), "layer 3, pos 2")
    assert str(error.value) == (
        "The metric 'metric' gave shape (2,) for layer 3, pos 2, and (1,) before. Its shape has to be the same for"
        " every run."
    )


def test_a_metric_that_fails_in_a_patched_run_is_reported_with_its_cell_and_cause():
    reader = reader_of(lambda z: math.sqrt(z[0, 1, 7].item()), run_of(0).abs())
    with pytest.raises(MetricError) as error:
        reader.measure_whole(-run_of(0).abs(), "layer 3, pos 2")
    assert str(error.value).startswith("The metric 'metric' failed at layer 3, pos 2: ValueError: ")
    assert isinstance(error.value.__cause__, ValueError)


# --- what a metric may give ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (1.5, torch.tensor(1.5)),
        (3, torch.tensor(3.0)),
        (True, torch.tensor(1.0)),
        (np.float64(0.1), torch.tensor(0.1, dtype=torch.float64)),
        (np.array([1, 2]), torch.tensor([1.0, 2.0])),
        (torch.tensor([[True], [False]]), torch.tensor([[1.0], [0.0]])),
        (torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)),
        (torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(0.5)),
        (-math.inf, torch.tensor(-math.inf)),
    ],
)
def test_a_metric_may_give_numbers_of_any_kind(given, value):
    reader = reader_of(lambda z: given)
    got = reader.measure(known(reader, run_of(3)), "a cell")["metric"]
    assert got.dtype == value.dtype
    assert torch.equal(got, value)
    assert reader.shapes["metric"] == value.shape


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "The metric 'metric' gave nothing (None): it may lack a return."),
        ("much", "The metric 'metric' gave 'much', a str."),
        ([1.0, 2.0], "The metric 'metric' gave a list of 2: torch.stack or torch.tensor makes it a tensor."),
        (
            {"a": 1},
            "The metric 'metric' gave a dict: give sweep a mapping of metrics instead, one for each number.",
        ),
        (1j, "The metric 'metric' gave 1j, a complex."),
        (torch.zeros(0), "The metric 'metric' gave a tensor of torch.float32 and shape (0,)."),
        (torch.zeros(2) * 1j, "The metric 'metric' gave a tensor of torch.complex64 and shape (2,)."),
    ],
)
def test_a_metric_that_gives_something_else_is_told_so(given, message):
    with pytest.raises(MetricError) as error:
        reader_of(lambda z: given)
    assert str(error.value).startswith(message)
    assert "It has to give a number (float, int or bool) or a tensor of numbers of any shape" in str(
        error.value
    )


def test_a_metric_that_is_nan_for_an_unpatched_run_is_told_so():
    with pytest.raises(MetricError) as error:
        reader_of(lambda z: z[0, 1, 5] - math.inf + math.inf)
    assert str(error.value).startswith(
        "The metric 'metric' is NaN at an unpatched run, where all logits are numbers."
    )


def test_a_metric_that_fails_for_an_unpatched_run_is_told_so():
    with pytest.raises(
        MetricError, match=r"^The metric 'metric' failed at an unpatched run: IndexError: "
    ) as error:
        reader_of(lambda z: z[0, 1, SIZE])
    assert isinstance(error.value.__cause__, IndexError)


def test_a_metric_of_another_shape_for_another_unpatched_run_is_told_so():
    with pytest.raises(MetricError) as error:
        reader_of(by_shape, run_of(0).abs(), -run_of(0).abs())
    assert str(error.value) == (
        "The metric 'metric' gave shape (2,) for an unpatched run, and (1,) before. Its shape has to be the same for"
        " every run."
    )
