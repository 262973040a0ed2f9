"""Children that were forked have their parent's memory and none of its threads: they compute by their own, and none hangs."""

import sys

import pytest

from support.processes import COUNTS, output_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what the children look at is Linux's")


# A child that hangs must not outlive the test: SIGALRM ends it, and then waitpid tells.
IN_CHILDREN = """
    import os, signal

    def fork(work):
        child = os.fork()
        if child == 0:
            signal.alarm(50)
            work()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""

FORK = """
    import numpy as np
    import normclip

    def clip():
        array = np.full(1_000_000, 1.0)
        assert normclip.clip_(array, 1.0) == 1000.0
        assert (array == 0.001).all()
        normclip.clamp_(array, 0.0005)
        assert (array == 0.0005).all()

    def clip_with_help():
        clip()
        assert len(os.listdir("/proc/self/task")) > 1, "helpers of its own"

    normclip.set_num_threads(2)
    fork(clip_with_help)  # before there is a pool
    clip()
    fork(clip_with_help)  # with the parent's pool in memory and none of its threads
    fork(lambda: fork(clip_with_help))
    normclip.set_num_threads(4)
    fork(clip_with_help)  # a pool that has to grow
    clip()
    print("clipped")
"""


def test_forked_children_clip() -> None:
    assert output_of(IN_CHILDREN + FORK) == "clipped\n"


WORKERS = """
    import multiprocessing, signal, warnings
    import numpy as np
    import torch
    import normclip

    def norm(size):
        signal.alarm(50)
        return normclip.total_norm(np.ones(size))  # torch.ones itself may hang here, in OpenMP

    class Dataset(torch.utils.data.Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, index):
            return norm(1_000_000)

    warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is what this is about
    torch.set_num_threads(2)
    normclip.total_norm(np.ones(1_000_000))
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        print(pool.map_async(norm, [1_000_000, 4_000_000, 100]).get(timeout=60))
    loader = torch.utils.data.DataLoader(Dataset(), num_workers=2, multiprocessing_context=context, timeout=60)
    print([batch.item() for batch in loader])
"""


def test_workers_of_multiprocessing_and_data_loaders_clip() -> None:
    assert output_of(WORKERS).splitlines() == ["[1000.0, 2000.0, 10.0]", "[1000.0, 1000.0, 1000.0, 1000.0]"]


# In a forked child OpenMP would wait for threads that are gone.
FORKS = """
    import torch
    {before}

    torch.set_num_threads(2)
    torch.ones(4_000_000).sum()  # starts torch's pool

    def clip():
        import normclip
        assert normclip.get_num_threads() == 2
        print(started(lambda array: normclip.clip_(array.copy(), 1.0)), flush=True)

    fork(clip)
    fork(lambda: fork(clip))
    clip()
    fork(clip)
"""


@pytest.mark.parametrize("before", ["import normclip", "pass"], ids=["imported before", "imported in the child"])
def test_forked_children_have_a_pool_of_their_own(before: str) -> None:
    # The parent's pool stays torch's.
    assert output_of(IN_CHILDREN + COUNTS + FORKS.format(before=before)).splitlines() == ["1", "1", "0", "1"]


LOADERS = """
    import warnings
    import torch
    import normclip

    warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is what this is about
    torch.set_num_threads(2)
    assert normclip.total_norm(array) == 2000.0
    workers = {{"num_workers": 2, "multiprocessing_context": "{method}", "timeout": 60}}
    print(list(torch.utils.data.DataLoader([array] * 4, collate_fn=normclip.total_norm, batch_size=1, **workers)))
    if "{method}" == "fork":
        more = lambda _: torch.set_num_threads(2)
        print(list(torch.utils.data.DataLoader([array] * 4, collate_fn=normclip.total_norm, batch_size=1, worker_init_fn=more, **workers)))
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_data_loaders(method: str) -> None:
    lines = output_of(COUNTS + LOADERS.format(method=method)).splitlines()
    assert lines == [str([2000.0] * 4)] * (2 if method == "fork" else 1)
