"""Memory of results that the CPU kernels keep for later ones: used again, never shared, bounded, and given back."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Iterator

import pytest
import torch
from support.ops.samples import same_bits
from torch import Tensor

import amct_ext
from amct_ext import ops

pytestmark = pytest.mark.cpu_kernels
MIB = 2**20


@pytest.fixture(autouse=True)
def nothing_idle() -> Iterator[None]:
    amct_ext.release_memory()
    yield
    amct_ext.release_memory()


def quantized(w: Tensor) -> Tensor:
    return ops.arq_fake_quantize(w, 8, 0)[0]


def test_the_weights_of_a_step_find_the_memory_of_the_step_before() -> None:
    weights = [torch.randn(256, 256 + 64 * i) for i in range(6)]
    step = [quantized(w) for w in weights]  # alive at once, as they are until backward
    addresses, values = [y.data_ptr() for y in step], [y.clone() for y in step]
    assert len(set(addresses)) == len(weights)
    while step:
        step.pop()  # backward lets the last layer go first
    step = [quantized(w) for w in weights]
    assert [y.data_ptr() for y in step] == addresses
    assert all(same_bits(a, b) for a, b in zip(step, values, strict=True))


def test_every_large_result_of_a_weight_is_kept() -> None:
    w, scale = torch.randn(512, 512), torch.ones(512)
    mask = ops.mask_2to4(w, 1)
    ours = [
        lambda: quantized(w),
        lambda: ops.lsq_fake_quantize(w, scale, 8, 0),
        lambda: ops.apply_mask(w, mask),
        lambda: ops.sparse_arq_fake_quantize(w, mask, 8, 0)[0],
        lambda: ops.sparsify_2to4(w, 1)[0],
        lambda: ops.sparse_arq_fake_quantize_2to4(w, 1, 8, 0)[0],
    ]
    address = ours[0]().data_ptr()
    for call in ours:
        assert call().data_ptr() == address
    masks = [lambda: ops.mask_2to4(w, 1), lambda: ops.sparsify_2to4(w, 1)[1]]
    masks.append(lambda: ops.sparse_arq_fake_quantize_2to4(w, 1, 8, 0)[2])
    address = masks[0]().data_ptr()
    for call in masks:
        assert call().data_ptr() == address


def test_a_block_in_use_stays_where_it_is() -> None:
    w = torch.randn(300, 400)
    first = quantized(w)
    address, kept, view = first.data_ptr(), first.clone(), first[3:]
    del first
    assert quantized(w).data_ptr() != address
    assert same_bits(view, kept[3:])
    del view
    amct_ext.release_memory()
    assert amct_ext.release_memory() == 0


def test_what_lies_idle_is_bounded_and_the_oldest_goes_first() -> None:
    w = torch.ones(64 * MIB // 8 + 1, 2)  # a little more than 64 MiB: three fit into 256
    size = w.numel() * 4
    results = [quantized(w) for _ in range(5)]
    addresses = [y.data_ptr() for y in results]
    while results:
        results.pop(0)
    assert [quantized(w).data_ptr() for _ in range(2)] == [addresses[-1]] * 2  # the last one is in the cache
    assert amct_ext.release_memory() == 3 * size
    del w
    for elements in (2**16 - 1, 2**26 + 1):  # below 256 KiB, above 256 MiB
        ops.apply_mask(torch.zeros(elements), torch.ones(elements, dtype=torch.bool))
        assert amct_ext.release_memory() == 0


def test_activations_keep_two_blocks_of_their_own() -> None:
    clips = torch.tensor(1.0), torch.tensor(-1.0), torch.tensor(torch.nan), torch.tensor(torch.nan)
    alive = [ops.ulq_fake_quantize(torch.randn(n, 2**18), *clips)[0] for n in (1, 2, 3, 4)]
    del alive
    assert amct_ext.release_memory() == 7 * MIB  # the two largest


def test_results_move_elsewhere() -> None:
    w = torch.randn(300, 400)
    size = w.numel() * 4
    expected = quantized(w).clone()
    shared, resized, stored = quantized(w), quantized(w), io.BytesIO()
    amct_ext.release_memory()
    shared.share_memory_()
    assert amct_ext.release_memory() == size
    resized.resize_(600, 400)
    assert amct_ext.release_memory() == size
    assert same_bits(shared, expected)
    assert same_bits(resized[:300], expected)
    resized.resize_(10, 10)
    torch.save(resized, stored)
    stored.seek(0)
    assert same_bits(torch.load(stored), expected.flatten()[:100].view(10, 10))
    array = quantized(w).numpy()
    assert same_bits(torch.from_numpy(array.copy()), expected)
    del resized, array
    assert amct_ext.release_memory() == 3 * size  # twice as long by now, and the array's


def test_threads_never_get_the_same_block() -> None:
    wrong: list[str] = []
    handed_over: list[Tensor] = []

    def work(value: int) -> None:
        w = torch.full((256, 256 + 64 * (value % 2)), float(value))
        mask = torch.ones_like(w, dtype=torch.bool)
        for _ in range(200):
            y, again = ops.apply_mask(w, mask), ops.apply_mask(w, mask)
            if not (torch.equal(y, w) and torch.equal(again, w)):
                wrong.append(f"thread {value}")
            handed_over.append(y)
            if len(handed_over) > 8:
                handed_over.pop(0)  # often of another thread

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_of_large_results_is_used_again_but_never_shared() -> None:
    high, low, none = torch.tensor(1.0), torch.tensor(-1.0), torch.tensor(math.nan)

    def quantized(x: Tensor) -> Tensor:
        return ops.ulq_fake_quantize(x, high, low, none, none)[0]

    x = torch.randn(300, 400)
    first = quantized(x)
    address, kept = first.data_ptr(), first.clone()
    others = [quantized(torch.randn(300, 400)) for _ in range(4)]
    assert len({y.data_ptr() for y in (first, *others)}) == 5
    assert torch.equal(first, kept)
    view = first[3:]
    del first, others
    assert quantized(x).data_ptr() != address  # a view still holds it
    del view
    smaller = quantized(x[:250])
    assert smaller.data_ptr() == address
    assert torch.equal(smaller, kept[:250])
    smaller.resize_(600, 400)
    assert torch.equal(smaller[:250], kept[:250])
