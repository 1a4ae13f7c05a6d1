"""Scratch memory: kept within a thread, never shared between threads, and never part of a result."""

from concurrent.futures import ThreadPoolExecutor

import torch

from vqssl import kernels
from vqssl.kernels.workspace import workspace

CPU = torch.device("cpu")


def test_buffer_is_reused_for_equal_or_smaller_shapes_of_its_name_and_dtype():
    first = workspace("test", torch.float32, CPU, 3, 5)
    assert workspace("test", torch.float32, CPU, 15).data_ptr() == first.data_ptr()
    assert workspace("test", torch.float64, CPU, 15).data_ptr() != first.data_ptr()
    assert workspace("test", torch.float32, CPU, 1000).numel() == 1000


def test_buffer_made_in_inference_mode_can_be_written_outside_of_it():
    with torch.inference_mode():
        buffer = workspace("test in inference mode", torch.float32, CPU, 3, 5)
    buffer.fill_(1.0)


def test_large_buffers_are_not_kept():
    huge = [workspace("test", torch.float32, CPU, 2**22 + 1) for _ in range(2)]
    assert huge[0].data_ptr() != huge[1].data_ptr()


def test_threads_do_not_share_buffers():
    def search(seed):
        generator = torch.Generator().manual_seed(seed)
        x, codes = torch.randn(3000, 8, generator=generator), torch.randn(100 + seed, 8, generator=generator)
        for _ in range(5):
            found = kernels.nearest_codeword(x, codes, "euclidean")
        return torch.equal(found, torch.cdist(x.double(), codes.double()).argmin(-1))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(search, range(24)))


def test_results_do_not_live_in_buffers():
    x, codes = torch.randn(300, 8), torch.randn(70, 8)
    found = kernels.nearest_codeword(x, codes, "euclidean")
    kept = found.clone()
    kernels.nearest_codeword(torch.randn(300, 8), torch.randn(70, 8), "cosine")
    assert torch.equal(found, kept)
